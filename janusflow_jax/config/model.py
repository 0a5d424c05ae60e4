"""The config of a model, and the model sizes by name."""

import dataclasses

from janusflow_jax.config import parts as parts_lib
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.config.fields import (
    between,
    choice,
    dataclass,
    depth,
    limited,
    positive,
)

ATTENTION = ("xla", "splash", "flash")
"""Implementations of attention (`models/attention.py`); a config may also have 'auto'."""

NONE, GENERATE, UNDERSTAND = 0, 1, 2
"""The task of an image slot; NONE: the slot is empty."""


@dataclass
class RopeConfig:
    """How rotary frequencies are scaled (`models.layers.rope_frequencies`)."""

    type: str = choice("default", "linear", "llama3")
    factor: float = positive(1.0)
    # llama3: by the wavelength, in parts of the positions that it was trained on before
    low_freq_factor: float = positive(1.0)
    high_freq_factor: float = positive(4.0)
    original_positions: int = positive(8192)


@dataclass
class LlamaConfig:
    """A Llama, or one of its relatives (`hub/families.py`)."""

    vocab_size: int = positive(102400)
    width: int = positive(2048)
    mlp_width: int = positive(5632)
    num_layers: int = depth(24)
    num_heads: int = positive(16)
    num_kv_heads: int = positive(16)
    head_dim: int = positive(128)
    norm_eps: float = positive(1e-6)
    rope_theta: float = positive(10000.0)
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    no_rope_layers: tuple[int, ...] = ()  # layers, from 0, without rotary positions
    attn_bias: str = choice("", "qkv", "qkvo")  # which projections have a bias
    mlp_bias: bool = False
    # RMSNorm of queries and keys before RoPE; head: of each head, all: of all heads together
    qk_norm: str = choice("", "head", "all")
    norms: str = choice("pre", "post")  # of a sublayer's input or output
    family: str = "llama"  # transformers' `model_type` of the same model


@dataclass
class SiglipConfig:
    image_size: int = positive(384)
    patch_size: int = positive(16)
    width: int = positive(1024)
    num_layers: int = depth(24)  # blocks that are used (select_layer already applied)
    num_heads: int = positive(16)
    mlp_width: int = positive(4096)
    norm_eps: float = positive(1e-6)
    act: str = choice("gelu", "gelu_tanh")  # the exact GELU (JanusFlow's), or the tanh form
    final_norm: bool = True
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = limited((), lambda std: all(x > 0 for x in std), "all > 0")

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass
class GenConfig:
    """The ConvNeXt encoder and decoder around the LLM, and the time embedding."""

    width: int = positive(768)
    num_blocks: int = depth(2)
    patch_size: int = positive(2)
    norm_eps: float = positive(1e-6)


@dataclass
class VaeConfig:
    channels: tuple[int, ...] = limited(
        (128, 256, 512, 512),
        lambda widths: 1 <= len(widths) <= 8 and min(widths) > 0,
        "1 to 8 numbers > 0",
    )
    layers_per_block: int = depth(2)
    norm_groups: int = positive(32)
    latent_channels: int = positive(4)
    # The model sees (latent - shift) * scaling_factor / std. shift and std: (), or 1, C or 4 C
    # numbers; 4 C are those of 2 x 2 latent pixels, the number of (c, y, x) at 4 c + 2 y + x.
    scaling_factor: float = positive(0.13025)
    shift: tuple[float, ...] = ()
    std: tuple[float, ...] = limited((), lambda std: all(x > 0 for x in std), "all > 0")
    norm_eps: float = positive(1e-6)
    quant_convs: bool = True  # a 1 x 1 convolution after the encoder and one before the decoder
    decoder_channels: tuple[int, ...] = limited(
        (), lambda widths: all(x > 0 for x in widths), "() (those of the encoder) or numbers > 0"
    )

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.channels) - 1)


@dataclass
class RepaConfig:
    layer: int = positive(6)  # LLM features after this many blocks
    width: int = positive(2048)


@dataclass
class StudentConfig:
    """What a model was distilled to, which generates in few steps (docs/few_steps.md)."""

    steps: int = between(0, 0, 100)  # of an image, unless a request says otherwise; 0: no student
    guidance_scale: float = positive(2.0)  # of its teacher; it needs none of its own

    @property
    def defaults(self) -> tuple[int, float]:
        """Steps and guidance scale of an image if a request names none; without a student the
        paper's."""
        return (self.steps, 1.0) if self.steps else (30, 2.0)


@dataclass
class ModelConfig:
    name: str = "1p3b"
    image_size: int = positive(384)
    llm: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    und: SiglipConfig = dataclasses.field(default_factory=SiglipConfig)
    gen: GenConfig = dataclasses.field(default_factory=GenConfig)
    vae: VaeConfig = dataclasses.field(default_factory=VaeConfig)
    repa: RepaConfig = dataclasses.field(default_factory=RepaConfig)
    # shared: the VAE and the generation encoder; own: another VAE encoder and ConvNeXt
    und_encoder: str = choice("siglip", "shared", "own")
    # whose features REPA aligns with; siglip: a frozen SigLIP that does nothing else
    repa_target: str = choice("und_encoder", "siglip")
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)

    @property
    def latent_size(self) -> int:
        """Side of the latent, in latent pixels."""
        return self.image_size // self.vae.downscale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.latent_size, self.latent_size, self.vae.latent_channels)

    @property
    def num_image_tokens(self) -> int:
        return (self.latent_size // self.gen.patch_size) ** 2

    @property
    def slot_len(self) -> int:
        """Positions that an image takes: one begin (or time) embedding and its features."""
        return 1 + self.num_image_tokens

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that this model has, in the order of `MODEL_PARTS`."""
        return parts_lib.existing(self)


def model_config(name: str, image_size: int = 0) -> ModelConfig:
    """A model size by name.

    Args:
      name: one of MODEL_SIZES.
      image_size: in pixels; 0 keeps the size's own.
    Raises:
      ConfigError: unknown name (lists the known).
    """
    if name not in MODEL_SIZES:
        known = ", ".join(MODEL_SIZES)
        raise ConfigError(f"model size: expected one of {known}; got {name!r}")
    cfg = MODEL_SIZES[name]()
    if image_size:
        cfg.image_size = image_size
        cfg.und.image_size = image_size
    return cfg


def _llama(width: int, num_heads: int, **fields: int) -> LlamaConfig:
    """A Llama whose heads share the width; each has keys of its own."""
    return LlamaConfig(
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        **fields,
    )


MODEL_SIZES = {
    "test": lambda: ModelConfig(
        name="test",
        image_size=64,
        llm=_llama(vocab_size=640, width=64, mlp_width=176, num_layers=3, num_heads=4),
        und=SiglipConfig(image_size=64, width=48, num_layers=2, num_heads=3, mlp_width=192),
        gen=GenConfig(width=32),
        vae=VaeConfig(channels=(16, 16, 32, 32), norm_groups=8),
        repa=RepaConfig(layer=2, width=96),
    ),
    "emoji": lambda: ModelConfig(
        name="emoji",
        image_size=64,
        llm=_llama(vocab_size=640, width=192, mlp_width=512, num_layers=4, num_heads=6),
        und=SiglipConfig(image_size=64, width=96, num_layers=4, num_heads=3, mlp_width=384),
        gen=GenConfig(width=192, patch_size=4),
        vae=VaeConfig(channels=(16, 32, 64), layers_per_block=1, norm_groups=4),
        repa=RepaConfig(layer=2, width=192),
    ),
    "small": lambda: ModelConfig(
        name="small",
        llm=_llama(vocab_size=32000, width=768, mlp_width=2048, num_layers=12, num_heads=12),
        und=SiglipConfig(width=384, num_layers=12, num_heads=6, mlp_width=1536),
        gen=GenConfig(width=256),
        repa=RepaConfig(layer=3, width=768),
    ),
    "1p3b": ModelConfig,
    "7b": lambda: ModelConfig(
        name="7b",
        llm=_llama(vocab_size=102400, width=4096, mlp_width=11008, num_layers=30, num_heads=32),
        repa=RepaConfig(layer=8),
    ),
}
