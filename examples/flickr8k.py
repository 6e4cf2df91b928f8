"""A CLIP for photographs, compressed to 25 %: Flickr8k, its 6,000 training photographs and 1,000 held out.

    python examples/flickr8k.py DATA/flickr8k-train --run runs/flickr8k

DATA/flickr8k-train holds captions.tsv (file, split, caption; five rows per photograph) and images.zip. Six thousand
photographs are few: the teacher is weak, and what is compared is how much of it each way to 25 % keeps.
"""

from study import Study, arguments, pairs

from tinyclip.distill.train import DataConfig
from tinyclip.evaluate.scores import Evaluation
from tinyclip.start import Scratch

options = arguments(__doc__)
table = options.data / "captions.tsv"
Study(
    options.run,
    data=DataConfig(
        train=pairs(table, images="images.zip", where="split=train"),
        crop_scale=(0.5, 1.0),
    ),
    evaluation=Evaluation(retrieval=pairs(table, images="images.zip", where="split=dev")),
    teacher=Scratch(
        embed_dim=128, image_size=96, patch_size=16, image_width=160, image_layers=5,
        text_width=128, text_layers=4, head_dim=32, context_length=40, vocabulary=4000,
    ),
    batch_size=256,
    teacher_steps=600,
    student_steps=150,
).run(options.seeds)  # fmt: skip
