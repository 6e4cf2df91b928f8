"""A CLIP for emoji, compressed to 25 %: drawings in five styles to train on, the sixth style held out.

    python examples/emoji.py DATA/emoji-demo --run runs/emoji

DATA/emoji-demo holds pairs.tsv (file, style, concept, name, keywords, split, ...) and images.zip. Training sees five
styles of the concepts in split "train". Retrieval is over the sixth style of the same concepts: 1,588 unseen drawings,
each to be found by its name among all others.
"""

from study import Study, arguments, pairs

from tinyclip.distill.train import DataConfig
from tinyclip.evaluate.scores import Evaluation
from tinyclip.start import Scratch

options = arguments(__doc__)
table = options.data / "pairs.tsv"
Study(
    options.run,
    data=DataConfig(
        train=pairs(
            table,
            images="images.zip",
            caption="{name}, {keywords}",
            sep="|",
            where="split=train;style!=noto;keywords!=",
        ),
        crop_scale=(0.7, 1.0),
    ),
    evaluation=Evaluation(
        retrieval=pairs(table, images="images.zip", caption="{name}", where="split=train;style=noto"),
    ),
    teacher=Scratch(
        embed_dim=128, image_size=96, patch_size=16, image_width=128, image_layers=4,
        text_width=128, text_layers=4, head_dim=32, context_length=32, vocabulary=3000,
    ),
    batch_size=256,
    teacher_steps=600,
    student_steps=150,
).run(options.seeds)  # fmt: skip
