"""Every config type of the project. Standard library only, so that config files load fast.

`model` describes a model, `run` a training run, `parts` the parts of the parameter tree, `stages`
what the paper's stages share, `checks` what makes a config impossible, `flags` the command line.
Config files import all of it by one name: `from janusflow_jax import config as c`.
"""
# ruff: noqa: F401

from janusflow_jax.config.errors import ConfigError, JanusFlowError
from janusflow_jax.config.fields import from_dict, raise_problems, to_dict
from janusflow_jax.config.flags import check_field, parse_arg, parse_folders
from janusflow_jax.config.model import (
    ATTENTION,
    GENERATE,
    MODEL_SIZES,
    NONE,
    UNDERSTAND,
    GenConfig,
    LlamaConfig,
    ModelConfig,
    RepaConfig,
    RopeConfig,
    SiglipConfig,
    StudentConfig,
    VaeConfig,
    model_config,
)
from janusflow_jax.config.parts import LORA_TARGETS, MODEL_PARTS, PRETRAINED_PARTS
from janusflow_jax.config.run import (
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from janusflow_jax.config.sampler import SamplerConfig

STAGE_PARTS = MODEL_PARTS  # the name in 0.1; remove in 0.3
