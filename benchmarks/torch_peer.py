# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
"""The benchmark's peer: JanusFlow in PyTorch on the same weights.

It combines transformers' Llama with its cache and PyTorch's own attention, diffusers' VAE, and the
rest from tools/torch_reference.py. `generate` has two forms: the published code computes the prompt
again at every Euler step; the cached form computes it once. Training uses autograd and AdamW.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tools import torch_reference

FROZEN = ("vision_und_enc_model.",)
warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)


class TorchPeer(torch_reference.Reference):
    """A published folder on a device.

    Args: compiled: whether to apply torch.compile to the Euler step's network and to the LLM.
    """

    def __init__(
        self, janusflow: str, vae: str, device: str, dtype: str, compiled: bool = False
    ) -> None:
        super().__init__(janusflow, vae, attention="sdpa")
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.t = {n: x.to(self.device, self.dtype) for n, x in self.t.items()}
        self.llm.to(self.device, self.dtype)
        self.vae.to(self.device, self.dtype)
        self._branches = torch.compile(self.branches) if compiled else self.branches
        self._decode_step = torch.compile(self.llm.forward) if compiled else self.llm.forward

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def to_device(self, x: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    # --- images

    def branches(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        tokens: int,
        features: torch.Tensor,
        t_emb: torch.Tensor,
    ) -> torch.Tensor:
        """Rows that begin with the prompt -> velocities of both branches of the guidance."""
        out = self.llm.model(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return self._velocity(out.last_hidden_state[:, -tokens:], features, t_emb)

    def _velocity(self, hidden: Any, features: Any, t_emb: Any) -> torch.Tensor:
        return self.gen_decoder(hidden, features.repeat(2, 1, 1, 1), t_emb.repeat(2, 1))

    def _slot(self, z: torch.Tensor, t: float) -> tuple[Any, Any, Any]:
        features, t_emb = self.gen_encoder(z.to(self.dtype), t)
        t_emb = t_emb.expand(len(z), -1)
        aligned = self.linear("vision_gen_enc_aligner", features.flatten(2).mT)
        return torch.cat([t_emb[:, None], aligned], dim=1).repeat(2, 1, 1), features, t_emb

    @torch.inference_mode()
    def generate(
        self, ids: np.ndarray, noise: np.ndarray, steps: int, weight: float, cached: bool
    ) -> np.ndarray:
        """Latents NHWC of prompts int[B, P] of one length, from noise [B, h, w, C]."""
        z, prompt = torch_reference.nchw(noise).to(self.device), self.to_device(ids)
        count, size = prompt.shape
        embeds = self.llm.model.embed_tokens(prompt).repeat(2, 1, 1)
        slot_len = 1 + (z.shape[-1] // 2) * (z.shape[-2] // 2)
        mask = torch.ones(2 * count, size + slot_len, dtype=torch.long, device=self.device)
        mask[count:, 1:size] = 0  # unconditional: BOS stays, positions stay the same
        positions = torch.arange(size + slot_len, device=self.device)[None].repeat(2 * count, 1)
        cache: Any = None
        if cached:
            start = {"attention_mask": mask[:, :size], "position_ids": positions[:, :size]}
            cache = self.llm.model(inputs_embeds=embeds, use_cache=True, **start).past_key_values
        for k in range(steps):
            slot, features, t_emb = self._slot(z, k / steps)
            if cached:
                out = self.llm.model(
                    inputs_embeds=slot,
                    attention_mask=mask,
                    position_ids=positions[:, size:],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache.crop(-slot_len)
                v = self._velocity(out.last_hidden_state[:, 1:], features, t_emb)
            else:
                x = torch.cat([embeds, slot], dim=1)
                v = self._branches(x, mask, positions, slot_len - 1, features, t_emb)
            v = v.float()
            z = z + (weight * v[:count] - (weight - 1) * v[count:]) / steps
        self._wait()
        return torch_reference.nhwc(z.cpu())

    @torch.inference_mode()
    def decode_latents(self, latents: np.ndarray) -> np.ndarray:
        """Pixels in [-1, 1], NHWC."""
        z = torch_reference.nchw(latents).to(self.device, self.dtype)
        x = self.vae.decode(z / self.scale).sample.clip(-1, 1)
        self._wait()
        return torch_reference.nhwc(x.float().cpu())

    # --- text

    @torch.inference_mode()
    def chat(self, ids: np.ndarray, slots: Any, new: int) -> np.ndarray:
        """Greedy tokens int[B, new] after prompts of one length, with transformers' cache.

        Args: slots: (pixels NHWC [B, H, W, 3], position of the image slot), or None.
        """
        tokens = self.to_device(ids)
        x = self.llm.model.embed_tokens(tokens)
        if slots is not None:
            pixels, at = slots
            features = self.linear("vision_und_enc_aligner", self.tower(pixels))
            x[:, at] = self.t["beg_of_und_embed"].reshape(-1)
            x[:, at + 1 : at + 1 + features.shape[1]] = features
        out = self.llm(inputs_embeds=x, use_cache=True, logits_to_keep=1)
        chosen = []
        for _ in range(new):
            chosen.append(out.logits[:, -1].argmax(-1))
            out = self._decode_step(
                input_ids=chosen[-1][:, None],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        self._wait()
        return torch.stack(chosen, 1).cpu().numpy()

    def tower(self, pixels: Any) -> torch.Tensor:
        """SigLIP's features by PyTorch's attention: NHWC pixels (array or tensor) -> [B, S, E]."""
        name = torch_reference.TOWER
        if isinstance(pixels, np.ndarray):
            pixels = self.to_device(pixels)
        x = pixels.movedim(-1, -3).to(self.dtype)
        kernel = self.t[f"{name}.patch_embed.proj.weight"]
        bias = self.t[f"{name}.patch_embed.proj.bias"]
        x = F.conv2d(x, kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
        x = x + self.t[f"{name}.pos_embed"]
        heads = self.und.get("heads", 16)
        count = sum(n.startswith(f"{name}.blocks.") and n.endswith("norm1.bias") for n in self.t)
        for i in range(count):
            block = f"{name}.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv", self._layer_norm(f"{block}.norm1", x))
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.linear(f"{block}.attn.proj", out)
            h = self.linear(f"{block}.mlp.fc1", self._layer_norm(f"{block}.norm2", x))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(h))
        return self._layer_norm(f"{name}.norm", x)


class TorchTrainer:
    """A training step of the same rows as ours: AR + RF, SigLIP and VAE frozen.

    REPA is off on both sides: a published folder has no head for it.
    """

    def __init__(self, peer: TorchPeer, lr: float = 1e-4) -> None:
        self.peer = peer
        trained = [*peer.llm.parameters()]
        for name, x in peer.t.items():
            if not name.startswith(FROZEN):
                trained.append(x.requires_grad_())
        for x in peer.llm.parameters():
            x.requires_grad_()
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr, (0.9, 0.95), weight_decay=0.0, fused=True)
        cast = peer.dtype != torch.float32
        self.autocast: Any = (
            torch.autocast(peer.device.type, peer.dtype) if cast else contextlib.nullcontext()
        )

    def step(self, batch: dict[str, np.ndarray], gen: int, und: int, draws: Any) -> float:
        """Forward, backward, clip and update on a batch of rows (`data/rows.py`).

        Args: gen, und: slots of a row for each task; draws: t, noise and posterior as ours.
        """
        with self.autocast:
            loss = self.loss(batch, gen, und, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.peer._wait()
        return float(loss.detach())

    def loss(self, batch: dict[str, np.ndarray], gen: int, und: int, draws: Any) -> torch.Tensor:
        """AR + RF, each averaged over its own targets."""
        p = self.peer
        row = {n: p.to_device(x) for n, x in batch.items() if n != "row"}
        x = p.llm.model.embed_tokens(row["tokens"].long())
        start, task = row["slot_start"].tolist(), row["slot_task"].tolist()
        images = row["images"].float() / 127.5 - 1
        generated: list[Any] = []
        for b, slots in enumerate(start):
            for k, at in enumerate(slots):
                if task[b][k] == 1:
                    slot, *rest = self._noisy(images[b, k], {n: y[b, k] for n, y in draws.items()})
                    generated.append((b, at, *rest))
                elif task[b][k] == 2:
                    with torch.no_grad():
                        features = p.tower(images[b, k][None])
                    begin = p.t["beg_of_und_embed"].reshape(1, 1, -1)
                    slot = torch.cat([begin, p.linear("vision_und_enc_aligner", features)], dim=1)
                else:
                    continue
                index = torch.arange(at, at + slot.shape[1], device=p.device)
                x = x.index_put((torch.tensor(b, device=p.device), index), slot[0].to(x.dtype))
        hidden = self._llm(x, row)
        labels = torch.roll(row["tokens"].long(), -1, 1)[row["target_mask"]]
        loss = x.new_zeros(())
        if len(labels):
            logits = p.llm.lm_head(hidden[row["target_mask"]]).float()
            loss = loss + F.cross_entropy(logits, labels)
        for b, at, features, t_emb, target in generated:
            length = features.shape[-1] * features.shape[-2]
            v = p.gen_decoder(hidden[b : b + 1, at + 1 : at + 1 + length], features, t_emb)
            loss = loss + (v.float() - target).square().mean() / len(generated)
        return loss

    def _llm(self, x: torch.Tensor, row: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = row["segment_ids"]
        visible = (ids[:, :, None] == ids[:, None, :]).tril()[:, None]
        mask = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(~visible, torch.finfo(x.dtype).min)
        return self.peer.llm.model(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=row["positions"].long(),
            use_cache=False,
        ).last_hidden_state

    def _noisy(self, image: torch.Tensor, draws: dict[str, np.ndarray]) -> tuple[Any, ...]:
        """A generation slot, the decoder's other inputs, and the target velocity."""
        p = self.peer
        with torch.no_grad():
            pixels = image.movedim(-1, 0)[None].to(p.dtype)
            posterior = p.vae.encode(pixels).latent_dist
            sample = torch_reference.nchw(draws["posterior"])[None].to(p.device)
            latent = (posterior.mean + posterior.std * sample).float() * p.scale
            noise = torch_reference.nchw(draws["noise"])[None].to(p.device)
            t = float(draws["t"])
            z = t * latent + (1 - t) * noise
        features, t_emb = p.gen_encoder(z.to(p.dtype), t)
        aligned = p.linear("vision_gen_enc_aligner", features.flatten(2).mT)
        slot = torch.cat([t_emb[:, None], aligned], dim=1)
        return slot, features, t_emb, latent - noise
