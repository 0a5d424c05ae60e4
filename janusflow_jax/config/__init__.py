"""Every configuration type of the project. Standard library only, so config files load fast.

`model` describes a model, `run` a training run, `parts` the parts of the parameter tree,
`stages` the stages of the paper, `checks` what makes a config impossible. The names that config
files use are here: `from janusflow_jax import config as c`.
"""

from janusflow_jax.config.errors import ConfigError, JanusFlowError
from janusflow_jax.config.model import (
    MODEL_PARTS,
    MODEL_SIZES,
    PRETRAINED_PARTS,
    REPA_TARGETS,
    UND_ENCODERS,
    GenConfig,
    LlamaConfig,
    ModelConfig,
    RepaConfig,
    SiglipConfig,
    VaeConfig,
    dataclass,
    model_config,
)
from janusflow_jax.config.run import (
    LORA_TARGETS,
    OPTIMIZERS,
    SOURCE_FIELDS,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    check_field,
    from_dict,
    parse_arg,
    raise_problems,
    to_dict,
)

STAGE_PARTS = MODEL_PARTS  # the name of 0.1; remove in 0.3

__all__ = [
    "LORA_TARGETS",
    "MODEL_SIZES",
    "OPTIMIZERS",
    "PRETRAINED_PARTS",
    "REPA_TARGETS",
    "SOURCE_FIELDS",
    "STAGE_PARTS",
    "MODEL_PARTS",
    "UND_ENCODERS",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GenConfig",
    "JanusFlowError",
    "LlamaConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RepaConfig",
    "SiglipConfig",
    "SourceConfig",
    "TrainConfig",
    "VaeConfig",
    "check_field",
    "dataclass",
    "from_dict",
    "model_config",
    "parse_arg",
    "raise_problems",
    "to_dict",
]
