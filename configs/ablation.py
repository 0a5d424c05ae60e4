"""The paper's six ablations, A to F, at 256 px (arXiv 2411.07975 table 5).

    python tools/convert_checkpoint.py --llm DIR --siglip DIR --vae DIR --out models/start256
    python -m janusflow_jax.train --config=configs/ablation.py:F

One letter is required; `test` beside it (`:A,test`) is its tiny twin, `own` takes the model and the
image size of the start (`:A,own`, or `:A,start=DIR`).

    A  without REPA
    B  one SDXL-VAE + ConvNeXt encoder for both tasks (understanding has its own aligner)
    C  an SDXL-VAE + ConvNeXt encoder of its own for understanding; its VAE encoder is trained
    D  understanding and text only: 5,000 steps at 30:0:20, then 8,000 at 14:0:6
    E  generation only, 37,000 steps; SigLIP is REPA's target alone
    F  all of it

All start from a pretrained language model, SigLIP-L/16-256 and SDXL-VAE, with pre-training's rate
and batch; A, B, C and F run 10,000 steps at 30:50:20, then 40,000 at 14:80:6. In B and C a frozen
SigLIP of its own is REPA's target. A source weighs as much as its share of the mixture, so that the
sources of D and E weigh the same beside one another as in F (`loss.norm`, docs/model.md).

Expect (table 5, guidance 7.5, 30 steps, MJHQ FID-10k; POPE, VQAv2, GQA):

    A  FID 19.84   82.40  69.62  54.43        D               85.03  69.10  54.23
    B  FID 18.05   78.13  53.94  44.04        E  FID 16.69
    C  FID 17.53   75.30  55.41  44.44        F  FID 17.61    84.73  69.20  54.83

Costs 50,000 steps of 512 packed rows of 4,096 positions (D 13,000, E 37,000): about 0.9e9 TFLOP for
F. Packed rows are as long as at 384 px and hold 13 images of 256 px instead of 6.
"""

from janusflow_jax import config as c
from janusflow_jax.config import stages

LETTERS = stages.ABLATIONS | {"D": "understanding and text only"}
START = "models/start256"
BOTH = {"understand": (30, 14), "generate": (50, 80), "text": (20, 6)}
MIXTURE = {  # shares of positions before and after the change, steps before it, steps in all
    "D": ({"understand": (30, 14), "text": (20, 6)}, 5_000, 13_000),
    "E": ({"generate": (1, -1)}, 0, 37_000),
}


def get_config(arg: str | None = None) -> c.TrainConfig:
    names, start = stages.parse(arg, LETTERS | {"own": stages.OWN, "test": stages.TEST})
    letters = sorted(names & set(LETTERS))
    if len(letters) != 1:
        raise c.ConfigError(
            f"configs/ablation.py: expected one letter of {', '.join(LETTERS)} (:A or :A,test); "
            f"got {letters or 'none'}"
        )
    (letter,) = letters
    weights, change, steps = MIXTURE.get(letter, (BOTH, 10_000, 50_000))
    cfg = stages.stage(
        names & {"own"} or {"256"},
        weights,
        form="plain",
        name=stages.run_name("ablation", names, start),
        start=start or START,
        train_parts=tuple(p for p in c.MODEL_PARTS if p != "und_encoder" or letter == "C"),
        optim=c.OptimConfig(lr=1e-4, warmup_steps=2000),
        loss=c.LossConfig(norm="mixture"),
        num_steps=steps,
    )
    cfg.data.change_row = change * cfg.batch_rows
    cfg.loss.repa_weight = 0.0 if letter in "AD" else 1.0
    if letter in "BC":
        cfg.model.und_encoder = "shared" if letter == "B" else "own"
        cfg.model.repa_target = "siglip"
        cfg.init = (("und_aligner", "fresh"),)  # of another width than SigLIP's
    if letter == "C":
        cfg.init += (("und_encoder", "fresh"),)  # a copy of the VAE's encoder
    if letter == "E":  # no text loss: training the head would only cost memory
        llm = ("llm/embedding", "llm/layers", "llm/norm")
        cfg.train_parts = (*llm, *(p for p in cfg.train_parts if p != "llm"))
    cfg = stages.long_run(cfg)
    return stages.test_twin(cfg, own_model="own" in names) if "test" in names else cfg
