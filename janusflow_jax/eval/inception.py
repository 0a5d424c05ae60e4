"""The Inception network of FID: uint8 images to 2048 features.

It is TensorFlow's graph of 2015-12-05, which differs from the published Inception v3 in its pooling
layers. Sources: arXiv 1512.00567 (the network) and 1706.08500 (FID). The port with which this one
agrees is torch-fidelity's. `tools/convert_scorer.py` makes the folder that `load` reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from janusflow_jax.checkpoints import checksums
from janusflow_jax.config import files
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.hub import safetensors as safetensors_io
from janusflow_jax.hub.tensors import raise_problems
from janusflow_jax.models import layers
from janusflow_jax.parallel import trees

SIZE = 299
"""Side of the network's input in pixels."""
OFFICIAL = "6726825d"
"""How the SHA-256 of the published `*-inception-2015-12-05-6726825d.pth` begins."""
BATCH_NORM_EPS = 1e-3
FILE, WEIGHTS = "inception.json", "inception"
TOLERANCE = 1e-3
"""How far the features of the check image may be from the stored ones, relative to their norm."""


# --- the network


class Conv(nn.Module):
    """Convolution, bias and ReLU. `from_torch` puts the batch norm into kernel and bias."""

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", layers.kernel_init, (*self.size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        strides = (self.stride, self.stride)
        x = lax.conv_general_dilated(
            x, kernel, strides, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return nn.relu(x + bias)


def _average_pool(x: Array) -> Array:
    # NOTE(parity): the mean is over the pixels inside the image, as in TensorFlow.
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _shrink_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(nn.Module):
    pool_features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        a = Conv(64, name="branch1x1")(x)
        b = Conv(48, name="branch5x5_1")(x)
        b = Conv(64, (5, 5), name="branch5x5_2")(b)
        c = Conv(64, name="branch3x3dbl_1")(x)
        c = Conv(96, (3, 3), name="branch3x3dbl_2")(c)
        c = Conv(96, (3, 3), name="branch3x3dbl_3")(c)
        d = Conv(self.pool_features, name="branch_pool")(_average_pool(x))
        return jnp.concatenate([a, b, c, d], axis=-1)


class BlockB(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        a = Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        b = Conv(64, name="branch3x3dbl_1")(x)
        b = Conv(96, (3, 3), name="branch3x3dbl_2")(b)
        b = Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(b)
        return jnp.concatenate([a, b, _shrink_pool(x)], axis=-1)


class BlockC(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        a = Conv(192, name="branch1x1")(x)
        b = Conv(self.width, name="branch7x7_1")(x)
        b = Conv(self.width, (1, 7), name="branch7x7_2")(b)
        b = Conv(192, (7, 1), name="branch7x7_3")(b)
        c = Conv(self.width, name="branch7x7dbl_1")(x)
        c = Conv(self.width, (7, 1), name="branch7x7dbl_2")(c)
        c = Conv(self.width, (1, 7), name="branch7x7dbl_3")(c)
        c = Conv(self.width, (7, 1), name="branch7x7dbl_4")(c)
        c = Conv(192, (1, 7), name="branch7x7dbl_5")(c)
        d = Conv(192, name="branch_pool")(_average_pool(x))
        return jnp.concatenate([a, b, c, d], axis=-1)


class BlockD(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        a = Conv(192, name="branch3x3_1")(x)
        a = Conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(a)
        b = Conv(192, name="branch7x7x3_1")(x)
        b = Conv(192, (1, 7), name="branch7x7x3_2")(b)
        b = Conv(192, (7, 1), name="branch7x7x3_3")(b)
        b = Conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(b)
        return jnp.concatenate([a, b, _shrink_pool(x)], axis=-1)


class BlockE(nn.Module):
    max_pool: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        a = Conv(320, name="branch1x1")(x)
        b = Conv(384, name="branch3x3_1")(x)
        b1 = Conv(384, (1, 3), name="branch3x3_2a")(b)
        b2 = Conv(384, (3, 1), name="branch3x3_2b")(b)
        c = Conv(448, name="branch3x3dbl_1")(x)
        c = Conv(384, (3, 3), name="branch3x3dbl_2")(c)
        c1 = Conv(384, (1, 3), name="branch3x3dbl_3a")(c)
        c2 = Conv(384, (3, 1), name="branch3x3dbl_3b")(c)
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.max_pool else _average_pool(x)
        d = Conv(192, name="branch_pool")(pooled)
        return jnp.concatenate([a, b1, b2, c1, c2, d], axis=-1)


class Inception(nn.Module):
    """The network up to its last pooling. Modules have the names of the published tensors."""

    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """Args: x: pixels from 0 to 255."""
        x = (x - 128) / 128
        x = Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _shrink_pool(x)
        x = Conv(80, name="Conv2d_3b_1x1")(x)
        x = Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _shrink_pool(x)
        for name, features in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = BlockA(features, name=f"Mixed_{name}")(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = BlockC(width, name=f"Mixed_{name}")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(name="Mixed_7b")(x)
        # NOTE(parity): the published graph pools with the maximum in its last block only.
        x = BlockE(max_pool=True, name="Mixed_7c")(x)
        return jnp.mean(x, axis=(1, 2))


def param_shapes() -> Any:
    """Shapes of the parameters, without computing anything."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]


@jax.jit
def _embed(params: Any, images: Array) -> Array:
    return Inception().apply({"params": params}, images)


# --- weights


@dataclasses.dataclass(frozen=True)
class LoadedInception:
    """The network with its parameters."""

    params: Any  # float32
    sha256: str  # of the published file
    official: bool  # whether that is the file with which FID is defined

    def embed(self, images: Float[np.ndarray, "B 299 299 3"]) -> Float[np.ndarray, "B 2048"]:
        """Features of images with values from 0 to 255, computed in float32 on any device."""
        # TPUs and GPUs would otherwise round the inputs of each convolution.
        with jax.default_matmul_precision("highest"):
            return np.asarray(_embed(self.params, images))


def from_torch(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters from the state dict of torch-fidelity or pytorch-fid.

    Raises:
      ConvertError: tensors are missing or have other shapes.
    """
    shapes = trees.flatten(param_shapes())
    leaves = {}
    for path in sorted({path.rpartition("/")[0] for path in shapes}):
        name = path.replace("/", ".")
        try:
            kernel, scale, shift, mean, variance = (
                np.asarray(tensors[f"{name}.{x}"], np.float64) for x in _PUBLISHED
            )
        except KeyError as error:
            raise ConvertError(
                f"{error.args[0]}: expected a tensor of FID's Inception network; got none: convert "
                f"a file inception-2015-12-05-{OFFICIAL}.pth"
            ) from error
        scale = scale / np.sqrt(variance + BATCH_NORM_EPS)
        kernel = kernel.transpose(2, 3, 1, 0) * scale  # OIHW to HWIO
        leaves[f"{path}/kernel"] = kernel.astype(np.float32)
        leaves[f"{path}/bias"] = (shift - mean * scale).astype(np.float32)
    raise_problems("FID's Inception network", trees.mismatches(shapes, leaves, "weights"))
    return trees.unflatten(leaves)


_PUBLISHED = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def check_image() -> Float[np.ndarray, "1 299 299 3"]:
    """A fixed image whose features the folder stores."""
    y, x, c = np.ogrid[:SIZE, :SIZE, :3]
    return ((7 * y + 3 * x + x * y // 11 + 50 * c) % 256).astype(np.float32)[None]


def save(path: Any, params: Any, sha256: str) -> LoadedInception:
    """Writes a folder for `load`: the weights, and their features of the check image.

    Args: sha256: of the published file.
    """
    net = LoadedInception(params, sha256, sha256.startswith(OFFICIAL))
    about = {"sha256": sha256, "check_features": net.embed(check_image())[0].tolist()}
    with files.replacing(files.resolve(path)) as folder:
        folder.mkdir(parents=True)
        safetensors_io.write_folder(
            folder,
            WEIGHTS,
            {
                name: safetensors_io.LazyTensor(x.shape, x.dtype, lambda x=x: x)
                for name, x in trees.flatten(params).items()
            },
        )
        (folder / FILE).write_text(json.dumps(about) + "\n")
    return net


def load(path: Any) -> LoadedInception:
    """Loads a folder of `save` and computes the features of the check image again.

    Raises:
      CheckpointError: no such folder, it is damaged, or this device computes other features.
    """
    folder = files.resolve(path)
    if not (folder / FILE).exists():
        raise CheckpointError(
            f"{folder}: expected FID's Inception network ({FILE}); got none: make the folder with "
            "tools/convert_scorer.py"
        )
    about = checksums.read_json(folder / FILE)
    tensors = safetensors_io.open_folder(folder, (WEIGHTS,))
    params = trees.unflatten({name: np.asarray(x) for name, x in tensors.items()})
    shapes = param_shapes()
    if problems := trees.mismatches(shapes, params, WEIGHTS):
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    net = LoadedInception(
        jax.device_put(params), about["sha256"], about["sha256"].startswith(OFFICIAL)
    )
    expected = np.asarray(about["check_features"], np.float32)
    error = np.linalg.norm(net.embed(check_image())[0] - expected) / np.linalg.norm(expected)
    if not error < TOLERANCE:
        raise CheckpointError(
            f"{folder}: expected the stored features of the check image; got others (relative "
            f"error {error:.1e}): convert the weights again, or compute on another device"
        )
    return net
