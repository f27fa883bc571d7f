import numpy as np
import pytest
import torch
from torch import nn

from lrqdit.calibration.observer import Observer, Sampling, check_seen
from lrqdit.calibration.statistics import ActivationStats
from lrqdit.errors import ModelError, NumericalError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, other=None):
        """With ``other``, k and v read another tensor (cross attention)."""
        y = self.to_q(x)
        z = x if other is None else other
        return self.to_out(y + (self.to_k(z) * self.to_v(z)).mean(-2, keepdim=True))


NAMES = ("to_q", "to_k", "to_v", "to_out")


def observe(model, *calls, names=NAMES, size=64, seed=0):
    with Observer(model, names, Sampling(size, seed)) as observer, torch.no_grad():
        for call in calls:
            model(*call)
    return observer.groups()


def test_statistics_equal_dense_ones():
    parts = [3 * random(5, 7, 8, seed=i) + torch.arange(8) for i in range(6)]
    stats = ActivationStats(8, 16, seed=0)
    for part in parts:
        stats.update(part)
    dense = torch.cat([part.reshape(-1, 8) for part in parts]).double()
    assert stats.token_count == len(dense) == 210
    assert stats.rms == pytest.approx(float(dense.square().mean().sqrt()), rel=1e-12)
    torch.testing.assert_close(stats.channel_mean.double(), dense.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.channel_absmax().double(), dense.abs().amax(0))
    offset = stats.channel_mean.half()
    expected = (dense - offset.double()).abs().amax(0)
    torch.testing.assert_close(stats.channel_absmax(offset).double(), expected, rtol=1e-6, atol=1e-6)


def test_long_inputs_are_read_in_chunks():
    x = random(10_000, 4)
    stats = ActivationStats(4, 16, seed=0)
    stats.update(x)
    assert stats.token_count == 10_000 and stats.rms == pytest.approx(float(x.double().square().mean().sqrt()))


def test_reservoir_is_bounded_and_deterministic():
    runs = []
    for _ in range(2):
        stats = ActivationStats(4, 50, seed=3)
        for index in range(40):
            stats.update(random(13, 4, seed=index))
            assert len(stats.tokens) == min(50, 13 * (index + 1))
        runs.append(stats.tokens)
    assert torch.equal(*runs)
    other = ActivationStats(4, 50, seed=4)
    for index in range(40):
        other.update(random(13, 4, seed=index))
    assert not torch.equal(runs[0], other.tokens)


def test_reservoir_is_uniform():
    """Each of 10 equal parts of the stream must fill about a tenth: chi-square with 9 degrees of freedom, p = 1e-4."""
    counts = np.zeros(10)
    for seed in range(20):
        stats = ActivationStats(1, 100, seed)
        for part in range(10):
            stats.update(torch.full((200, 1), float(part)))
        counts += np.bincount(stats.tokens[:, 0].int().numpy(), minlength=10)
    assert counts.sum() == 2000
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


def test_reservoir_keeps_the_dtype_and_no_storage():
    stats = ActivationStats(4, 8, seed=0)
    stats.update(random(1000, 4).bfloat16())
    assert stats.tokens.dtype == torch.bfloat16
    assert stats.tokens.untyped_storage().nbytes() == 8 * 4 * 2


def test_memory_does_not_grow():
    stats = ActivationStats(4, 8, seed=0)
    for index in range(50):
        stats.update(random(100, 4, seed=index))
    tensors = [stats.tokens, stats._priorities]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 8 * 4 * 4 + 8 * 4
    arrays = [v for v in vars(stats).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in arrays) == 4 * 4 * 8
    assert stats.second_moment(torch.zeros(4)) is None


def test_second_moment():
    """Around any offset, with a constant far larger than what varies, in as many calls as it takes."""
    x = random(10_000, 6).double() + torch.tensor([0, 1e4, -3, 0, 200, 0])
    stats = ActivationStats(6, 8, seed=0, has_moment=True)
    for part in x.float().split(999):
        stats.update(part)
    for offset in (torch.zeros(6), stats.channel_mean):
        difference = x - offset
        found = stats.second_moment(offset)
        torch.testing.assert_close(found, difference.T @ difference / len(x), rtol=1e-5, atol=0.05)
        again = ActivationStats.from_tensors(stats.to_tensors())
        assert torch.equal(again.second_moment(offset), found)


def test_held_out_calls():
    """They alone fill the reservoir and stay out of the second moment; every other statistic counts them."""
    fitted, held_out = random(40, 4), random(30, 4, seed=1) + 100
    stats = ActivationStats(4, 16, seed=0, has_moment=True)
    for x, flag in ((fitted, False), (held_out, True), (fitted, False)):
        stats.update(x, flag)
    assert stats.is_held_out and stats.tokens.min() > 50 and len(stats.tokens) == 16
    expected = fitted.double().T @ fitted.double() / 40
    torch.testing.assert_close(stats.second_moment(torch.zeros(4)), expected, rtol=1e-5, atol=1e-6)
    assert stats.token_count == 110 and stats.channel_absmax().min() > 50


def test_every_so_many_calls_are_held_out():
    layer = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(layer)
    with Observer(model, ("0",), Sampling(8, 0, 1 << 20, held_out_every=4)) as observer, torch.no_grad():
        for index in range(9):
            model(torch.full((2, 4), float(index)))
    tokens = observer.groups()[0].stats.tokens
    assert set(tokens.flatten().tolist()) == {3.0, 7.0}


def test_moments_within_their_memory():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    with Observer(model, ("0", "1", "2"), Sampling(8, 0, moment_bytes=4 * (64 + 16))) as observer, torch.no_grad():
        model(random(5, 8))
    found = [group.stats.second_moment(torch.zeros(1)) is not None for group in observer.groups()]
    assert found == [True, True, False]


def test_round_trip_through_tensors():
    stats = ActivationStats(4, 8, seed=0)
    stats.update(random(100, 4))
    again = ActivationStats.from_tensors(stats.to_tensors())
    assert again.rms == stats.rms and again.token_count == 100
    assert torch.equal(again.tokens, stats.tokens) and torch.equal(again.channel_mean, stats.channel_mean)
    assert torch.equal(again.channel_absmax(), stats.channel_absmax())


def test_q_k_v_form_a_group():
    groups = observe(Attention(), (random(2, 5, 8),), (random(2, 5, 8, seed=1),))
    assert [group.names for group in groups] == [["to_q", "to_k", "to_v"], ["to_out"]]
    assert all(group.stats.token_count == 20 for group in groups)  # the shared input is counted once


def test_cross_attention_has_two_groups():
    groups = observe(Attention(), (random(5, 8), random(3, 8, seed=1)))
    assert [group.names for group in groups] == [["to_q"], ["to_k", "to_v"], ["to_out"]]
    assert [group.stats.token_count for group in groups] == [5, 3, 5]


def test_a_layer_that_stops_sharing_is_on_its_own():
    """k and v read q's tensor in the first call and another one in the second."""
    x, other = random(5, 8), 10 * random(3, 8, seed=1)
    groups = {tuple(group.names): group.stats for group in observe(Attention(), (x,), (x.clone(), other))}
    assert set(groups) == {("to_q",), ("to_k",), ("to_v",), ("to_out",)}
    assert groups["to_q",].token_count == 10
    assert groups["to_q",].channel_absmax().max() == x.abs().max()
    for name in ("to_k", "to_v"):
        assert groups[name,].channel_absmax().max() == other.abs().max()
        assert groups[name,].tokens is not groups["to_q",].tokens


def test_change_in_place_separates():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x)
            return y + self.b(x.mul_(2))

    groups = observe(Careless(), (random(3, 8),), names=("a", "b"))
    assert [group.names for group in groups] == [["a"], ["b"]]
    assert groups[1].stats.rms == pytest.approx(2 * groups[0].stats.rms)


def test_the_same_layer_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) + self.a(x)

    (group,) = observe(Twice(), (random(3, 8),), names=("a",))
    assert group.names == ["a"] and group.stats.token_count == 6


def test_input_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(input=x)

    (group,) = observe(Keyword(), (random(3, 8),), names=("a",))
    assert group.stats.token_count == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_names_the_layer(bad):
    x = random(5, 8)
    x[2, 6] = bad
    with pytest.raises(NumericalError, match=r"the input of to_q contains NaN or Inf \(channel 6\)"):
        observe(Attention(), (x,))


def test_a_layer_that_never_ran(caplog):
    model = Attention()
    model.spare = nn.Linear(8, 8)
    observer = Observer(model, (*NAMES, "spare"), Sampling(16, 0))
    with observer:
        model(random(3, 8))
    assert observer.unseen == ["spare"] and "spare" not in [n for g in observer.groups() for n in g.names]
    unused = Observer(Attention(), NAMES, Sampling(16, 0))
    check_seen({"first": observer, "second": unused})
    assert "1 layers of first never ran and will be quantized without data: spare" in caplog.text
    assert "all 4 layers of second never ran" in caplog.text
    with pytest.raises(ModelError, match="no layer of second or third ran"):
        check_seen({"second": unused, "third": unused})


def test_empty_inputs_do_not_count():
    groups = observe(Attention(), (random(3, 8),), (torch.zeros(0, 8),))
    assert groups[0].stats.token_count == 3


def test_hooks_are_removed():
    model = Attention()
    with pytest.raises(ValueError, match="stop"), Observer(model, NAMES, Sampling(8, 0)):
        raise ValueError("stop")
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_inference_mode():
    model, x = Attention(), random(3, 8)
    with Observer(model, NAMES, Sampling(8, 0)) as observer, torch.inference_mode():
        model(x.clone())
    assert observer.groups()[0].names == ["to_q", "to_k", "to_v"]
    assert observer.groups()[0].stats.rms == pytest.approx(float(x.double().square().mean().sqrt()))


def test_threads_change_nothing():
    x, results = random(6000, 8), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            stats = ActivationStats(8, 100, seed=0)
            stats.update(x)
            results.append(stats.to_tensors())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
