"""A byte-level language model of the standard library's sources, context 4096, striped over eight devices.

striate train configs/stdlib.py

On two cores: about four minutes of training, to 2.64 bits per held-out byte (xz -9 of the same bytes: 1.90).
"""

from striate.configs.schema import Experiment
from striate.lib.training.data import DataConfig
from striate.lib.training.loop import RunConfig
from striate.lib.training.optimiser import OptimiserConfig
from striate.lib.training.partition import MeshConfig
from striate.models.decoder import DecoderConfig, Layer

NGRAMS = {"ngram_orders": (2, 3, 4, 5), "ngram_buckets": 8192}
LOCAL = Layer(mask="window(255) & same('document')")
GLOBAL = Layer(mask="causal() & same('document')")
PATTERN = (LOCAL, LOCAL, LOCAL, GLOBAL)

experiment = Experiment(
    model=DecoderConfig(width=192, layers=4, heads=4, kv_heads=2, head_dim=32, hidden=512, pattern=PATTERN, **NGRAMS),
    data=DataConfig(length=4096, batch=1, **NGRAMS),
    optimiser=OptimiserConfig(learning_rate=5e-3, warmup=15, final_fraction=0.02),
    mesh=MeshConfig(sequence=8, layout="striped", stripe=128, strategy="ring"),
    run=RunConfig(name="stdlib", steps=280, eval_every=140, checkpoint_every=140),
)
