# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
"""A reference JanusFlow in PyTorch: transformers' Llama, diffusers' AutoencoderKL, and the rest
written here after docs/model.md. It shares no code with the package, keeps no cache between Euler
steps and computes one example at a time: slow and simple. Needs the extra `dev`.

Everything is float32 on the CPU. Inputs and outputs are numpy arrays; images and latents are NHWC.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
TOWER = "vision_und_enc_model.vision_tower"


def read_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors (one file or shards), as float32."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= {name: x.float() for name, x in load_file(file).items()}
    if not out:
        raise OSError(f"{folder}: expected *.safetensors; found none")
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.movedim(-3, -1).numpy()


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).movedim(-1, -3)


class Reference:
    """A published JanusFlow folder and an AutoencoderKL folder, as PyTorch."""

    def __init__(self, janusflow: str, vae: str, attention: str = "eager") -> None:
        folder = pathlib.Path(janusflow)
        read = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))  # noqa: E731
        config = read("config.json")
        self.processor = read("processor_config.json")
        self.image_size = read("preprocessor_config.json")["image_size"]
        self.und = config["vision_und_enc_config"]["params"]
        self.eps = config["vision_gen_enc_config"]["params"].get("norm_eps", 1e-6)
        self.t = read_tensors(folder)
        prefix = "language_model."
        weights = {n[len(prefix) :]: x for n, x in self.t.items() if n.startswith(prefix)}
        self.t = {n: x for n, x in self.t.items() if not n.startswith(prefix)}
        options = {**config["language_config"], "attn_implementation": attention}
        llama = transformers.LlamaConfig(**options)
        self.llm: Any = transformers.LlamaForCausalLM(llama).eval()
        self.llm.load_state_dict(weights, strict=True, assign=True)
        self.llm_eps = llama.rms_norm_eps
        diffusers.utils.logging.set_verbosity_error()  # it recommends accelerate
        self.vae: Any = diffusers.AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32)
        self.vae.eval()
        self.scale = self.vae.config.scaling_factor
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.add_bos = read("tokenizer_config.json").get("add_bos_token", True) is not False

    # --- text and images

    def _ids(self, text: str) -> list[int]:
        """User text: special strings in it are text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _bos(self) -> list[int]:
        return [self.tokenizer.bos_token_id] if self.add_bos else []

    def _tag(self, key: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.processor[key])

    def question_ids(self, question: str) -> list[int]:
        """One image, then the question."""
        front = self._bos() + self._ids(f"{SYSTEM}\n\nUser: ")
        image = [self._tag("image_tag")] * self.processor["num_image_tokens"]
        image = [self._tag("image_start_tag"), *image, self._tag("image_end_tag")]
        return front + image + self._ids(f"\n{question}\n\nAssistant:")

    def prompt_ids(self, prompt: str) -> list[int]:
        return self._bos() + self._ids(f"User: {prompt}\n\nAssistant:")

    def prepare(self, image: Image.Image) -> np.ndarray:
        """float32[1, H, W, 3]: the long side resized to the model's, centered on gray."""
        size = self.image_size
        factor = max(image.size)
        width, height = (max(int(side / factor * size), 14) for side in image.size)
        canvas = Image.new("RGB", (size, size), (127, 127, 127))
        small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(small, ((size - width) // 2, (size - height) // 2))
        return (np.asarray(canvas, np.float32)[None] / 255 - 0.5) / 0.5

    # --- the parts

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def _layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.t[f"{name}.weight"], self.t[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def siglip(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """States [1, S, E] after the embedding, after each block, and after the final norm."""
        kernel = self.t[f"{TOWER}.patch_embed.proj.weight"]
        x = F.conv2d(
            nchw(pixels), kernel, self.t[f"{TOWER}.patch_embed.proj.bias"], stride=kernel.shape[-1]
        )
        x = x.flatten(2).mT + self.t[f"{TOWER}.pos_embed"]
        count = 1 + max(int(n.split(".")[3]) for n in self.t if n.startswith(f"{TOWER}.blocks."))
        select, heads = self.und.get("select_layer", -2), self.und.get("heads", 16)
        count = count + select + 1 if select <= 0 else select
        states = [x]
        for i in range(count):
            name = f"{TOWER}.blocks.{i}"
            qkv = self.linear(f"{name}.attn.qkv", self._layer_norm(f"{name}.norm1", x))
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
            x = x + self.linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
            h = self.linear(f"{name}.mlp.fc1", self._layer_norm(f"{name}.norm2", x))
            x = x + self.linear(f"{name}.mlp.fc2", F.gelu(h))
            states.append(x)
        return [*states, self._layer_norm(f"{TOWER}.norm", x)]

    def _block(self, name: str, x: torch.Tensor, t_emb: torch.Tensor) -> torch.Tensor:
        """ConvNeXt with GRN, FiLM after the residual; NCHW."""
        kernel, bias = self.t[f"{name}.depthwise.weight"], self.t[f"{name}.depthwise.bias"]
        h = F.conv2d(x, kernel, bias, padding=3, groups=x.shape[1]).movedim(1, -1)
        h = rms_norm(h, self.t[f"{name}.norm.weight"], self.eps)
        h = F.gelu(self.linear(f"{name}.channelwise_linear_1", h))
        norm = h.square().sum((1, 2), keepdim=True).sqrt()
        norm = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        grn = f"{name}.channelwise_norm"
        h = self.t[f"{grn}.bias"] + (self.t[f"{grn}.weight"] * norm + 1) * h
        x = x + self.linear(f"{name}.channelwise_linear_2", h).movedim(-1, 1)
        film = self.linear(f"{name}.cond_embeds_mapper", F.silu(t_emb))[:, :, None, None]
        scale, shift = film.chunk(2, dim=1)
        return x * (1 + scale) + shift

    def _blocks(self, model: str, x: torch.Tensor, t_emb: torch.Tensor) -> torch.Tensor:
        names = {n.rsplit(".", 2)[0] for n in self.t if n.startswith(f"{model}.mid_block")}
        for i in range(len({n.split(".")[3] for n in names})):
            x = self._block(f"{model}.mid_block.res_blocks.{i}", x, t_emb)
        return x

    def gen_encoder(
        self, z: torch.Tensor, t: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents NCHW and times in [0, 1], one or [B] -> features NCHW, time embedding [B, D]."""
        name = "vision_gen_enc_model"
        half = self.t[f"{name}.time_embed.linear_1.weight"].shape[1] // 2
        freq = torch.arange(half, dtype=torch.float32, device=z.device) / half
        times = torch.as_tensor(t, dtype=torch.float32, device=z.device).reshape(-1, 1)
        angle = 1000 * times * torch.exp(-math.log(10000) * freq)
        t_emb = torch.cat([angle.cos(), angle.sin()], dim=-1).to(z.dtype)
        t_emb = F.silu(self.linear(f"{name}.time_embed.linear_1", t_emb))
        t_emb = self.linear(f"{name}.time_embed.linear_2", t_emb)
        kernel, bias = self.t[f"{name}.in_conv.weight"], self.t[f"{name}.in_conv.bias"]
        return self._blocks(name, F.conv2d(z, kernel, bias, stride=2), t_emb), t_emb

    def gen_decoder(
        self, hidden: torch.Tensor, skip: torch.Tensor, t_emb: torch.Tensor
    ) -> torch.Tensor:
        """The LLM's states [B, S, D] at the latent positions -> velocity NCHW."""
        name = "vision_gen_dec_model"
        x = rms_norm(hidden, self.t["vision_gen_dec_aligner_norm.weight"], self.llm_eps)
        x = self.linear("vision_gen_dec_aligner", x)
        x = rms_norm(x, self.t[f"{name}.input_norm.weight"], self.eps)
        x = x.mT.unflatten(-1, skip.shape[-2:])
        x = self._blocks(name, torch.cat([x, skip.expand(len(x), -1, -1, -1)], dim=1), t_emb)
        out = f"{name}.out_convs.0"
        x = rms_norm(x.movedim(1, -1), self.t[f"{out}.norm.weight"], self.eps).movedim(-1, 1)
        kernel = self.t[f"{out}.unpatch_conv.weight"]
        return F.pixel_shuffle(F.conv2d(x, kernel, self.t[f"{out}.unpatch_conv.bias"]), 2)

    def embed(self, ids: list[int]) -> torch.Tensor:
        return self.llm.model.embed_tokens(torch.tensor([ids]))

    # --- the two tasks

    @torch.no_grad()
    def understand(self, image: Image.Image, question: str, max_new: int) -> dict[str, Any]:
        """Every intermediate result from an image and a question to an answer."""
        pixels, ids = self.prepare(image), self.question_ids(question)
        states = self.siglip(pixels)
        x = self.embed(ids)
        at = ids.index(self._tag("image_start_tag"))
        x[0, at] = self.t["beg_of_und_embed"].reshape(-1)
        features = self.linear("vision_und_enc_aligner", states[-1])
        x[0, at + 1 : at + 1 + features.shape[1]] = features[0]
        out = self.llm(inputs_embeds=x, use_cache=True, output_hidden_states=True)
        hidden, logits, tokens = out.hidden_states, out.logits, []
        while len(tokens) < max_new:
            tokens.append(int(out.logits[0, -1].argmax()))
            if tokens[-1] == self.tokenizer.eos_token_id:
                break
            step = torch.tensor([tokens[-1:]])
            out = self.llm(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        numpy = lambda many: [y.numpy() for y in many]  # noqa: E731
        return {
            "pixels": pixels,
            "ids": ids,
            "siglip": numpy(states),
            "embeds": x.numpy(),
            "hidden": numpy(hidden),
            "logits": logits.numpy(),
            "tokens": tokens,
        }

    @torch.no_grad()
    def generate(self, prompt: str, noise: np.ndarray, steps: int, weight: float) -> dict[str, Any]:
        """Every intermediate result from a prompt and noise [1, h, w, C] to an image.

        Args: weight: guidance scale.
        """
        ids = self.prompt_ids(prompt)
        embeds, z = self.embed(ids), nchw(noise)
        states, first = [z], {}
        for k in range(steps):
            features, t_emb = self.gen_encoder(z, k / steps)
            aligned = self.linear("vision_gen_enc_aligner", features.flatten(2).mT)
            x = torch.cat([embeds, t_emb[:, None], aligned], dim=1).repeat(2, 1, 1)
            mask = torch.ones(x.shape[:2], dtype=torch.long)
            mask[1, 1 : len(ids)] = 0  # unconditional: BOS stays, positions do not move
            positions = torch.arange(x.shape[1]).repeat(2, 1)
            out = self.llm.model(
                inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False
            )
            hidden = out.last_hidden_state[:, -aligned.shape[1] :]
            v = self.gen_decoder(hidden, features, t_emb)
            if not first:
                first = {"features": nhwc(features), "t_emb": t_emb.numpy(), "velocity": nhwc(v)}
                first["hidden"] = hidden.numpy()
            z = z + (weight * v[:1] - (weight - 1) * v[1:]) / steps
            states.append(z)
        return {
            "ids": ids,
            "trajectory": np.stack([nhwc(s) for s in states]),
            **first,
            "image": self.decode(nhwc(z)),
        }

    @torch.no_grad()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Posterior means times the scale."""
        return nhwc(self.vae.encode(nchw(pixels)).latent_dist.mean * self.scale)

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents -> pixels, clipped to [-1, 1]."""
        return nhwc(self.vae.decode(nchw(latents) / self.scale).sample.clip(-1, 1))
