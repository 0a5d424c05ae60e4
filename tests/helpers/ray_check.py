"""Run as a script with a model folder: two replicas of `launch/ray_serve.py` on a local Ray."""

import base64
import importlib.util
import io
import json
import os
import pathlib
import sys
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
PORT = 8199
URL = f"http://127.0.0.1:{PORT}"


def ask(path, body=None):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read(), response.headers


def main(model):
    import numpy as np
    import ray
    from PIL import Image
    from ray import serve

    import janusflow_jax

    spec = importlib.util.spec_from_file_location("ray_serve", ROOT / "launch" / "ray_serve.py")
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    small = "--rows 2 --lanes 1 --context 256 --prompt-tokens 64".split()
    args, served = launcher.parse(["--replicas", "2", "--", "--model", model, *small])
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        options = launcher.deployment_options(args)
        serve.run(launcher.application(options, served), name="janusflow", route_prefix="/")
        for _ in range(8):  # of both replicas: neither gets requests before it is ready
            ask("/ready")
        body = {"prompt": "a red fox", "seed": 3, "num_inference_steps": 2}
        answers = [json.loads(ask("/v1/images/generations", body)[0]) for _ in range(6)]
        files = {x["data"][0]["b64_json"] for x in answers}
        assert len(files) == 1, "replicas differ"
        got = np.asarray(Image.open(io.BytesIO(base64.b64decode(files.pop()))))
        pipeline = janusflow_jax.load(model, dtype="float32")
        (want,) = pipeline.generate("a red fox", seed=3, num_steps=2, output="numpy")
        assert np.abs(got.astype(int) - want).max() <= 1
        page, headers = ask("/")
        assert b"JanusFlow" in page and "default-src 'none'" in headers["content-security-policy"]
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "300",  # a busy machine starts slowly
    }
    main(sys.argv[1])
