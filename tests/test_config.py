import dataclasses
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrqdit import config
from lrqdit.config import ACTIVATION_BITS, MODES, WEIGHT_BITS, QuantizationConfig
from lrqdit.errors import ConfigError, LrqditError
from lrqdit.numerics import codebook
from lrqdit.numerics.packing import PARTS
from lrqdit.numerics.rotation import ROTATIONS


@given(st.sampled_from(WEIGHT_BITS), st.sampled_from(ACTIVATION_BITS), st.sampled_from(list(MODES)), st.integers())
def test_round_trip(weight_bits, activation_bits, mode, seed):
    one = QuantizationConfig.from_name(f"w{weight_bits}a{activation_bits}", mode, seed=seed, exclude=["a", "b$"])
    assert one.preset == f"w{weight_bits}a{activation_bits}"
    assert QuantizationConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert QuantizationConfig.from_dict(one.to_dict()) == one and hash(one) == hash(dataclasses.replace(one))


def test_paper_mode():
    paper = QuantizationConfig.from_name(" W3A4 ", "paper")
    assert (paper.weight_bits, paper.activation_bits, paper.mode) == (3, 4, "paper")
    assert (paper.table_scope, paper.rotation, paper.smoothing, paper.keep_bits) == ("row", "threshold", "always", 16)
    assert not paper.is_centred and not paper.is_clipped
    assert QuantizationConfig.from_name("w3a4", "paper", is_centred=True).is_centred  # keywords win


@pytest.mark.parametrize("name", ["", "w4", "4a8", "w4a8x", "int4", "w-4a8", None, 4])
def test_bad_names(name):
    with pytest.raises(ConfigError, match="not of the form"):
        QuantizationConfig.from_name(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 7}, "weight_bits=7 is not supported; use one of 2, 3, 4, 5, 6, 8"),
        ({"weight_bits": True}, "weight_bits=True"),
        ({"activation_bits": 5}, "activation_bits=5"),
        ({"mode": "best"}, "mode='best'"),
        ({"table_scope": "block"}, "table_scope='block'"),
        ({"rotation": "spiral"}, "rotation='spiral'"),
        ({"smoothing": "maybe"}, "smoothing='maybe'"),
        ({"keep_bits": 4}, "keep_bits=4"),
        ({"smoothing_alpha": 0}, "smoothing_alpha=0"),
        ({"smoothing_alpha": 1.0}, "smoothing_alpha=1.0"),
        ({"smoothing_alpha": float("nan")}, "smoothing_alpha=nan"),
        ({"smoothing_alpha": "a"}, "smoothing_alpha='a'"),
        ({"damping": 0}, "damping=0"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"moment_gib": -1}, "moment_gib=-1"),
        ({"moment_gib": "all"}, "moment_gib=.all. is not a number"),
        ({"calibration_tokens": 15}, "calibration_tokens=15"),
        ({"calibration_tokens": "many"}, "calibration_tokens='many'"),
        ({"rotation_threshold": "high"}, "rotation_threshold='high'"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"is_centred": "yes"}, "is_centred='yes'"),
        ({"is_clipped": 1}, "is_clipped=1"),
        ({"codebook": 4}, "codebook=4"),
        ({"exclude": ["("]}, "exclude='\\(' is not a regular expression"),
        ({"exclude": "blocks"}, "exclude='blocks'"),
        ({"exclude": [1]}, r"exclude=\[1\]"),
        ({"wieght_bits": 4}, "unknown setting.* wieght_bits; known: activation_bits"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        QuantizationConfig.from_dict(settings)
    assert isinstance(caught.value, LrqditError) and isinstance(caught.value, ValueError)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationConfig().seed = 1


def test_registries_agree():
    assert tuple(PARTS) == WEIGHT_BITS
    assert set(ROTATIONS) <= set(config.choices("rotation"))
    assert config.choices("table_scope") == codebook.SCOPES
    assert QuantizationConfig().codebook in codebook.CODEBOOKS
    for mode, settings in MODES.items():
        assert QuantizationConfig.from_name("w4a8", mode).mode == mode and set(settings) <= set(
            QuantizationConfig().to_dict()
        )


def test_no_torch():
    source = Path(config.__file__).read_text(encoding="utf-8")
    assert "import torch" not in source and sys.modules["lrqdit.config"] is config
