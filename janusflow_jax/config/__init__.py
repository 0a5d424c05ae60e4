"""Every config type of the project. Standard library only, so that config files load fast.

`model` describes a model, `run` a training run, `parts` the parts of the parameter tree, `stages`
what the paper's stages share, `checks` what makes a config impossible, `flags` the command line.
Config files import all of it by one name: `from janusflow_jax import config as c`.
"""

from janusflow_jax.config.errors import ConfigError as ConfigError, JanusFlowError as JanusFlowError
from janusflow_jax.config.fields import (
    dataclass as dataclass,
    from_dict as from_dict,
    raise_problems as raise_problems,
    to_dict as to_dict,
)
from janusflow_jax.config.flags import check_field as check_field, parse_arg as parse_arg
from janusflow_jax.config.model import (
    ATTENTION as ATTENTION,
    GENERATE as GENERATE,
    MODEL_SIZES as MODEL_SIZES,
    NONE as NONE,
    UNDERSTAND as UNDERSTAND,
    GenConfig as GenConfig,
    LlamaConfig as LlamaConfig,
    ModelConfig as ModelConfig,
    RepaConfig as RepaConfig,
    SiglipConfig as SiglipConfig,
    VaeConfig as VaeConfig,
    model_config as model_config,
)
from janusflow_jax.config.parts import (
    LORA_TARGETS as LORA_TARGETS,
    MODEL_PARTS as MODEL_PARTS,
    PRETRAINED_PARTS as PRETRAINED_PARTS,
)
from janusflow_jax.config.run import (
    DataConfig as DataConfig,
    EvalConfig as EvalConfig,
    LoraConfig as LoraConfig,
    LossConfig as LossConfig,
    MeshConfig as MeshConfig,
    OptimConfig as OptimConfig,
    SourceConfig as SourceConfig,
    TrainConfig as TrainConfig,
)

STAGE_PARTS = MODEL_PARTS  # the name in 0.1; remove in 0.3
