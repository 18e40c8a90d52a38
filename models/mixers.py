"""The mixers that a layer of the decoder takes by name: Layer(mixer="gated_delta")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flax import linen as nn

from striate.models import attentive, attentive_memory, bidirectional, convolutional, recurrent
from striate.models.layers import Attention

TAPS = {"taps": 4}  # of a short convolution before the recurrence


@dataclass(frozen=True)
class Kind:
    """A mixer, and what a decoder has to know of it.

    Attributes:
      module: called as (x (B, T, E), tokens, k_tokens, past), gives (output, what to cache).
      options: given to the module beside the sizes of the model.
      attends: it takes a mask, positions and a score, and how softmax attention crosses devices as `parallel`.
      recurs: it takes how recurrences cross devices: as `parallel`, or as `recurrence` where it attends too.
      sees_later: outputs depend on later tokens of the document: no model of the next token can be made of it.
    """

    module: type[nn.Module]
    options: Mapping = field(default_factory=dict)
    attends: bool = False
    recurs: bool = True
    sees_later: bool = False


MIXERS = {
    "attention": Kind(Attention, attends=True, recurs=False),
    "lightning": Kind(recurrent.Lightning),
    "gated_linear": Kind(recurrent.GatedLinear, TAPS),
    "gated_delta": Kind(recurrent.GatedDelta, TAPS),
    "lightnet": Kind(recurrent.LightNet),
    "latte": Kind(recurrent.Latte, TAPS),
    "second_order": Kind(recurrent.HigherOrder, {"order": "second"}),
    "asymmetric": Kind(recurrent.HigherOrder, {"order": "asymmetric"}),
    "flow": Kind(recurrent.Flow),
    "gated_lru": Kind(recurrent.GatedLRU, TAPS),
    "tptt": Kind(attentive.MemoryAsGate, attends=True),
    "chela": Kind(convolutional.Chela),
    "gam": Kind(convolutional.GatedMemory),
    "lavo": Kind(attentive_memory.OrthogonalMemory, attends=True),
    "arflow": Kind(attentive_memory.FrameAttention, attends=True, sees_later=True),
    "hydra": Kind(bidirectional.Hydra, {"taps": 7}, sees_later=True),
    "vssd": Kind(bidirectional.VSSD, {"taps": 3}, sees_later=True),
    "efficient": Kind(bidirectional.Efficient, sees_later=True),
    "lightnet_both": Kind(bidirectional.LightNetBoth, sees_later=True),
    "flow_both": Kind(bidirectional.FlowBoth, sees_later=True),
}
