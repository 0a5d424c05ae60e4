# GenEval's official scorer (github.com/djghosh13/geneval, MIT), which needs a GPU and mmdet 2.x.
#
# NOT BUILT AND NOT RUN by this project: no weights and no registry were at hand. The versions are
# those with which others run the scorer on an H100; the authors' environment (CUDA 11.3) predates it.
#
#   docker build -f launch/score_geneval.Dockerfile -t score-geneval launch
#   docker run --gpus all --shm-size 4g -v $PWD/runs/geneval:/run -v $PWD/coco:/coco score-geneval
#
# /run/images: images of `python -m janusflow_jax.benchmark geneval`. /coco: annotations/
# instances_val2017.json and val2017/*.jpg, with which the scorer is checked first.
# It writes /run/self_check.json and /run/results.jsonl.
FROM pytorch/pytorch:2.1.2-cuda12.1-cudnn8-devel
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends git wget libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# The detector's deformable attention is compiled here, for every GPU from V100 to H200. Without
# code for the GPU it runs and finds almost nothing.
ENV MMCV_WITH_OPS=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="7.0;8.0;8.6;8.9;9.0"
RUN pip install --no-cache-dir "setuptools==60.2.0" "numpy<2" ninja wheel \
    && pip install --no-cache-dir --no-build-isolation --no-binary mmcv-full "mmcv-full==1.7.2"
RUN pip install --no-cache-dir "numpy<2" "opencv-python-headless<4.10" pandas \
    "open-clip-torch==2.26.1" "clip-benchmark==1.4.0"

RUN git clone https://github.com/djghosh13/geneval /geneval \
    && git -C /geneval checkout af4902f24d3ca90ebbb446dd9891a59e0f82725f
# The scorer reads its detector's config from a checkout beside the package.
RUN git clone --depth 1 --branch v2.28.2 https://github.com/open-mmlab/mmdetection /mmdetection \
    && pip install --no-cache-dir --no-build-isolation -e /mmdetection

ARG DETECTOR=mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco
RUN mkdir /models && wget -q -O /models/$DETECTOR.pth https://download.openmmlab.com/mmdetection/v2.0/mask2former/$DETECTOR/${DETECTOR}_20220504_001756-743b7d99.pth \
    && sha256sum /models/$DETECTOR.pth | grep '^743b7d99'
RUN python -c "import open_clip; open_clip.create_model('ViT-L-14', pretrained='openai')"

COPY check_scorer.py /check_scorer.py
CMD python /check_scorer.py geneval --coco /coco --out /run/self_check.json \
    && python /geneval/evaluation/evaluate_images.py /run/images --outfile /run/results.jsonl \
       --model-path /models \
    && python /geneval/evaluation/summary_scores.py /run/results.jsonl
