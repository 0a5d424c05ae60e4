# DPG-Bench's official scorer (github.com/TencentQQGYLab/ELLA, Apache-2.0), which needs a GPU and
# modelscope.
#
# NOT BUILT AND NOT RUN by this project: no weights and no registry were at hand.
#
#   docker build -f launch/score_dpg.Dockerfile -t score-dpg launch
#   docker run --gpus all --shm-size 4g -v $PWD/runs/dpg:/run -v $PWD/coco:/coco score-dpg
#
# /run/images: images of `python -m janusflow_jax.benchmark dpg`, grids of 2 x 2. /coco: as for
# score_geneval.Dockerfile. RESOLUTION is the side of one image of a grid: 384, or 256 for the
# smaller model. It writes /run/self_check.json, /run/dpg.txt and /run/dpg_detail.txt; the last is
# what `--results` wants.
FROM pytorch/pytorch:2.1.2-cuda12.1-cudnn8-devel
ENV DEBIAN_FRONTEND=noninteractive RESOLUTION=384
RUN apt-get update && apt-get install -y --no-install-recommends git libgl1 libglib2.0-0 libsndfile1 \
    && rm -rf /var/lib/apt/lists/*
# fairseq's requirements are refused by a newer pip.
RUN pip install --no-cache-dir "pip<24.1" "numpy==1.26.4" "setuptools<70"
RUN git clone https://github.com/TencentQQGYLab/ELLA /ella \
    && git -C /ella checkout 3c228f1dc6c4d3cad0a47493816151a419f14db3
RUN pip install --no-cache-dir -r /ella/requirements-for-dpg_bench.txt "numpy==1.26.4" \
    "modelscope==1.20.0" "transformers<4.46" "diffusers<0.32"
RUN python -c "from modelscope import snapshot_download; snapshot_download('damo/mplug_visual-question-answering_coco_large_en')"

# The script skips the first row of the questions, so it gets a file with that row twice.
RUN python -c "import csv; rows = list(csv.reader(open('/ella/dpg_bench/dpg_bench.csv'))); \
    csv.writer(open('/dpg_bench.csv', 'w')).writerows([*rows[:2], *rows[1:]])"
COPY check_scorer.py /check_scorer.py
WORKDIR /ella
CMD python /check_scorer.py dpg --coco /coco --out /run/self_check.json \
        --images /run/images --resolution $RESOLUTION \
    && accelerate launch --num_machines 1 --num_processes 1 --mixed_precision fp16 \
       dpg_bench/compute_dpg_bench.py --image-root-path /run/images --resolution $RESOLUTION \
       --pic-num 4 --csv /dpg_bench.csv --res-path /run/dpg.txt --vqa-model mplug
