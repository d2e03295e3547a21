"""Caches held in fewer bits: each number as gguf, torch's fp8 and KIVI have it, and read where it would be stored."""

import numpy as np
import oracle
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from golden import golden_options
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import shared

from sinkbench.cache.formats import kivi_keys, kivi_values, read_back
from sinkbench.cache.stream import StreamCache
from sinkbench.engines.captured import refuses_rings
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.stepwise import Stepwise
from sinkbench.errors import UserError
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.reach import Reach
from sinkbench.strategies import choose
from sinkbench.strategies.formats import Kivi, parse

GGUF = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
IN_BLOCKS = ("q8_0", "q4_0", "fp8_e4m3")
WIDE = {"head_dim": 32}  # blocks of 32 want heads of as many features


def llama(**changes):
    return tiny.build("llama", **{**WIDE, **tiny.GROUPED, **changes})


def by_gguf(name, x):
    with np.errstate(all="ignore"):
        return dequantize(quantize(x, GGUF[name]), GGUF[name])


def nll(engine, plan, tokens, start=0):
    return np.array([value for steps in engine.run(plan, tokens, start) for value in steps.nll])


def same_numbers(ours, theirs):
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy(), theirs)


class TestBlocks:
    @pytest.mark.parametrize("name", GGUF)
    @given(
        x=arrays(
            np.float32,
            (3, 64),
            elements=st.floats(-(2.0**40), 2.0**40, width=32) | st.sampled_from([0.0, -0.0, 1e-30, -1e-12, 1.0, -1.0]),
        )
    )
    @example(x=np.zeros((1, 32), np.float32))
    def test_blocks_are_those_of_gguf_bit_for_bit(self, name, x):
        same_numbers(read_back(parse(name), torch.from_numpy(x)[None])[0], by_gguf(name, x))

    @pytest.mark.parametrize("name", GGUF)
    @pytest.mark.parametrize("size", [1e-38, 1e-7, 1e-3, 1.0, 3e4, 1e9])
    def test_random_numbers_of_any_size_are_those_of_gguf(self, name, size):
        x = (size * torch.randn(2, 3, 50, 128)).float()
        same_numbers(read_back(parse(name), x), by_gguf(name, x.numpy()))

    @pytest.mark.parametrize("name", GGUF)
    @pytest.mark.parametrize("largest", [127.0, -127.0, 8.0, -8.0, 4.0, -1.0])
    def test_ties_of_rounding_and_of_size_go_as_in_gguf(self, name, largest):
        x = torch.arange(-16, 16).float() / 2 * largest / 8
        x[5], x[20], x[21] = largest, -largest, largest
        for row in (x, x.flip(0)):
            same_numbers(read_back(parse(name), row[None]), by_gguf(name, row[None].numpy()))

    @pytest.mark.parametrize("name", GGUF)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes_are_encoded_as_float32_and_come_back_as_they_were(self, name, dtype):
        x = torch.randn(2, 4, 5, 64).to(dtype)
        got = read_back(parse(name), x)
        assert got.dtype == dtype
        assert torch.equal(got, torch.from_numpy(by_gguf(name, x.float().numpy())).to(dtype))

    @pytest.mark.cuda
    @pytest.mark.parametrize("name", IN_BLOCKS)
    def test_cuda_rounds_as_the_cpu_does(self, name):
        x = torch.randn(4, 4, 1000, 64)
        assert torch.equal(read_back(parse(name), x.cuda()).cpu(), read_back(parse(name), x))

    def test_fp8_has_three_bits_behind_the_leading_one_and_ends_at_448(self):
        x = torch.tensor([[1e6, -1e6, 449.0, 448.0, -500.0, 1.0, 1.0625, 1.1875, 0.0, 2.0**-9, 2.0**-11]])
        want = torch.tensor([[448, -448, 448, 448, -448, 1, 1, 1.25, 0, 2.0**-9, 0]])
        assert torch.equal(read_back(parse("fp8_e4m3"), x), want)
        assert read_back(parse("fp8_e4m3"), x.bfloat16()).dtype == torch.bfloat16

    def test_as_computed_is_left_alone(self):
        x = torch.randn(1, 2, 3, 5)
        assert read_back(parse("model"), x) is x


class TestKivi:
    def test_codes_run_from_the_least_to_the_largest_of_a_group_and_round_half_to_even(self):
        x = torch.tensor([0.0, 3.0, 0.5, 1.5, 2.5, 1.4, 2.6, 0.6]).view(1, 1, 1, 8)
        want = torch.tensor([0.0, 3.0, 0.0, 2.0, 2.0, 1.0, 3.0, 1.0]).view(1, 1, 1, 8)
        assert torch.equal(kivi_values(Kivi("kivi2", 8), x), want)
        assert torch.equal(kivi_keys(Kivi("kivi2", 8), x.mT), want.mT)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", ["kivi2", "kivi4"])
    def test_groups_of_one_value_come_back_as_that_value(self, name, dtype):
        for value in (0.0, -3.25, 1e-7, 3e4):
            x = torch.full((1, 2, 4, 8), value, dtype=dtype)
            assert torch.equal(kivi_keys(Kivi(name, 4), x), x)
            assert torch.equal(kivi_values(Kivi(name, 4), x), x)

    @pytest.mark.parametrize("name", ["kivi2", "kivi4"])
    def test_keys_share_a_scale_along_tokens_and_values_along_channels(self, name):
        x, levels = torch.randn(2, 3, 8, 12), 2 ** Kivi(name).bits - 1
        keys, values = torch.empty_like(x), torch.empty_like(x)
        for i in range(0, 8, 4):
            part = x[:, :, i : i + 4]
            low, scale = part.amin(2, True), (part.amax(2, True) - part.amin(2, True)) / levels
            keys[:, :, i : i + 4] = ((part - low) / scale).round() * scale + low
        for i in range(0, 12, 4):
            part = x[..., i : i + 4]
            low, scale = part.amin(3, True), (part.amax(3, True) - part.amin(3, True)) / levels
            values[..., i : i + 4] = ((part - low) / scale).round() * scale + low
        assert torch.equal(kivi_keys(Kivi(name, 4), x), keys)
        assert torch.equal(kivi_values(Kivi(name, 4), x), values)

    def test_an_entry_is_read_as_computed_until_its_token_has_come_and_in_few_bits_ever_after(self):
        model = shared("llama")
        plan = tiny.plan(model, "transformers", kv_format="kivi2:group=4,residual=8")
        layer, stored = StreamCache(model, plan).kept[0], Kivi("kivi2", 4, 8)
        keys, values = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
        for t in range(40):
            got_keys, got_values = layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
            full = t // 8 * 8  # t tokens were there before this one
            assert torch.equal(got_keys[:, :, :full], kivi_keys(stored, keys[:, :, :full]))
            assert torch.equal(got_keys[:, :, full:], keys[:, :, full : t + 1])
            old = max(0, t - 8)
            assert torch.equal(got_values[:, :, :old], kivi_values(stored, values[:, :, :old]))
            assert torch.equal(got_values[:, :, old:], values[:, :, old : t + 1])
        with pytest.raises(UserError, match="one token at a time: use --engine stepwise"):
            layer.update(keys[:, :, :2], values[:, :, :2])

    @pytest.mark.parametrize("start", [1, 31, 32, 33, 64, 90])
    def test_a_stream_is_taken_up_wherever_it_was_left(self, start):
        model, tokens = shared("llama"), tiny.tokens(100)
        plan = tiny.plan(model, "transformers", kv_format="kivi2:group=16,residual=32")
        assert np.array_equal(nll(Stepwise(model), plan, tokens, start), nll(Stepwise(model), plan, tokens)[start:])

    def test_it_matters_once_the_residual_is_full_and_not_before(self):
        model, tokens = shared("llama"), tiny.tokens(60)
        kivi = tiny.plan(model, "transformers", kv_format="kivi2:group=16,residual=32")
        whole, few = (nll(Stepwise(model), plan, tokens) for plan in (tiny.plan(model, "transformers"), kivi))
        assert np.array_equal(whole[:32], few[:32])
        assert np.abs(whole - few)[32:].min() > 0

    def test_layers_with_a_window_of_their_own_are_refused(self):
        model = tiny.build("mistral", sliding_window=8, **tiny.GROUPED)
        with pytest.raises(UserError, match="nothing is ever evicted"):
            tiny.plan(model, "transformers", 16, kv_format="kivi2:group=16")


STREAMS = [
    ("transformers", None, "q4_0"),
    *(("attention_sinks", positions, name) for positions in ("cache", "text") for name in ("q4_0", "fp8_e4m3")),
    *((s, p, "q8_0") for s in ("windowed", "attention_sinks", "context_shift", "h2o") for p in ("cache", "text")),
]


class TestStreams:
    @pytest.mark.parametrize("kv_format", IN_BLOCKS)
    def test_the_newest_token_too_is_read_as_it_would_be_stored(self, kv_format):
        model, stored = llama(), parse(kv_format)
        layer = StreamCache(model, tiny.plan(model, "attention_sinks", kv_format=kv_format)).kept[0]
        keys, values = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32)
        got = layer.update(keys, values)
        assert torch.equal(got[0], read_back(stored, keys))
        assert torch.equal(got[1], read_back(stored, values))
        assert not torch.equal(got[0], keys)

    @pytest.mark.parametrize(("strategy", "positions", "kv_format"), STREAMS)
    def test_streams_go_on_where_they_were_left_and_chunks_agree(self, strategy, positions, kv_format, monkeypatch):
        # positions begin anew within the test, at other tokens in each engine
        monkeypatch.setattr("sinkbench.positions.reach.SPARE", 8)
        model, tokens = llama().double(), tiny.tokens(75)
        plan = tiny.plan(model, strategy, 16, None, positions, kv_format)
        wanted = nll(Stepwise(model), plan, tokens)
        assert nll(Stepwise(model), plan, tokens, 52) == pytest.approx(wanted[52:], abs=1e-9, rel=0)
        whole = nll(Stepwise(model), tiny.plan(model, strategy, 16, None, positions), tokens)
        assert np.abs(wanted - whole).max() > 1e-4
        if not plan.by_score:
            assert nll(Parallel(model, 21), plan, tokens) == pytest.approx(wanted, abs=1e-9, rel=0)

    @pytest.mark.parametrize("strategy", ["attention_sinks", "h2o"])
    def test_where_positions_begin_anew_is_no_part_of_a_format(self, strategy, monkeypatch):
        model, tokens = llama().double(), tiny.tokens(120)
        plan = tiny.plan(model, strategy, 16, None, "cache", "q4_0")
        wanted = nll(Stepwise(model), plan, tokens)
        monkeypatch.setattr(Reach, "end", lambda reach, n: 17 + n)
        assert nll(Stepwise(model), plan, tokens) == pytest.approx(wanted, abs=1e-9, rel=0)

    @pytest.mark.parametrize(
        ("family", "changes", "tolerance"),
        [  # BLOOM adds its terms, and GPT-J has its products, in float32 whatever the dtype
            ("bloom", {"hidden_size": 128}, 1e-5),
            ("gptj", {"hidden_size": 128, "rotary_dim": 16}, 1e-5),
            ("gemma3", WIDE, 1e-9),
        ],
    )
    def test_other_families_agree_in_chunks(self, family, changes, tolerance):
        model, tokens = tiny.STREAMABLE[family](**changes).double(), tiny.tokens(60)
        plan = tiny.plan(model, "attention_sinks", kv_format="q8_0")
        wanted = nll(Stepwise(model), plan, tokens)
        assert nll(Parallel(model, 21), plan, tokens) == pytest.approx(wanted, abs=tolerance, rel=0)

    @pytest.mark.parametrize("kv_format", GGUF)
    @pytest.mark.parametrize("sinks", [0, 4])
    def test_a_brute_force_cache_that_gguf_encodes_gives_the_same(self, sinks, kv_format, monkeypatch):
        class Stored(oracle.Text):
            """Keys, rotated at their place in the text, and values, through gguf and back as they come."""

            def update(self, *given, **more):
                super().update(*given, **more)
                for x in (self.keys, self.values):
                    x[:, :, -1:] = torch.from_numpy(by_gguf(kv_format, x[:, :, -1:].numpy()))
                seen = [*self.held(self.fed - 1), self.fed - 1]
                return self.keys[:, :, seen], self.values[:, :, seen]

        monkeypatch.setattr(oracle, "Text", Stored)
        monkeypatch.setattr("sinkbench.positions.reach.SPARE", 8)
        model, tokens = llama().double(), tiny.tokens(60)

        def held(layer, layers, fed):
            return [t for t in range(fed) if t < sinks or t >= fed - (16 - sinks)]

        with exact_angles(model):  # a model's own are of float32, which moves a number to the next code now and then
            wanted = oracle.by_position(model, tokens, held, "text").numpy()
        plan = tiny.plan(model, "attention_sinks", 16, sinks, "text", kv_format)
        assert nll(Stepwise(model), plan, tokens) == pytest.approx(wanted, abs=1e-9, rel=0)

    def test_frequencies_that_change_within_the_window_take_a_format(self):
        model, tokens = tiny.SCALED["dynamic"](**WIDE), tiny.tokens(140)
        plan = tiny.plan(model, "attention_sinks", 80, kv_format="q8_0")
        got, whole = (nll(Stepwise(model), p, tokens) for p in (plan, tiny.plan(model, "attention_sinks", 80)))
        assert 0 < np.abs(got - whole).mean() < 0.1

    @pytest.mark.parametrize("kv_format", [*IN_BLOCKS, "kivi2"])
    def test_steps_in_a_format_are_not_captured(self, kv_format):
        model = llama()
        assert "format" in refuses_rings(model, tiny.plan(model, "transformers", kv_format=kv_format))


class TestBytes:
    @pytest.mark.parametrize(("kv_format", "each"), [("model", 128), ("q8_0", 34), ("q4_0", 18), ("fp8_e4m3", 32)])
    def test_what_would_be_stored_is_counted_with_its_scales(self, kv_format, each):
        model, tokens = llama(), tiny.tokens(30)
        plan = tiny.plan(model, "attention_sinks", kv_format=kv_format)
        want = [2 * 2 * 2 * each * min(n, 16) for n in range(1, 30)]  # layers, heads, a key and a value
        for engine in (Stepwise(model), Parallel(model, 7)):
            assert [b for steps in engine.run(plan, tokens) for b in steps.kv_cache_bytes] == want

    @pytest.mark.parametrize(("bits", "dtype"), [(2, torch.float32), (4, torch.float32), (2, torch.bfloat16)])
    def test_kivi_counts_codes_minima_scales_and_what_is_held_as_computed(self, bits, dtype):
        model, size = shared("llama") if dtype == torch.float32 else tiny.ROTARY["llama"]().to(dtype), dtype.itemsize
        plan = tiny.plan(model, "transformers", kv_format=f"kivi{bits}:group=8,residual=16")
        got = [b for steps in Stepwise(model).run(plan, tiny.tokens(60)) for b in steps.kv_cache_bytes]
        want = []
        for n in range(1, 60):
            keys, values = n // 16 * 16, max(0, n - 16)
            codes = (keys + values) * 16 * bits // 8
            scales = (keys // 8 * 16 + values * 16 // 8) * 2 * size
            want.append(2 * 2 * (codes + scales + (2 * n - keys - values) * 16 * size))  # layers, heads
        assert got == want


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("q5_1", "there are model, q8_0, q4_0, fp8_e4m3, kivi2, kivi4"),
            ("", "is not known"),
            ("q8_0:group=16", 'q8_0 has no parameter "group"; it has none'),
            ("kivi2:groups=16", "did you mean group?"),
            ("kivi2:", "has no parameter"),
            ("kivi2:group=0", 'group must be an integer of at least 1 (got "0")'),
            ("kivi2:group", 'group must be an integer of at least 1 (got "")'),
            ("kivi2:residual=1.5", "residual must be an integer"),
            ("kivi2:group=16,group=8", "group is given twice"),
            ("kivi4:group=16,residual=40", "residual must be a multiple of group (got 40 and 16)"),
        ],
    )
    def test_what_is_no_format_is_one_line(self, text, told):
        with pytest.raises(UserError) as error:
            parse(text)
        assert told in str(error.value)
        assert len(str(error.value).splitlines()) == 1

    @pytest.mark.parametrize("strategy", ["attention_sinks", "windowed", "h2o", "recompute"])
    def test_kivi_goes_with_nothing_that_evicts(self, strategy):
        with pytest.raises(UserError, match="--kv-format kivi2: "):
            choose(strategy, 16, kv_format="kivi2")

    def test_where_no_cache_is_carried_there_is_no_format(self):
        with pytest.raises(UserError, match="recompute carries no cache"):
            choose("recompute", 16, kv_format="q8_0")

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--kv-format", "q8_0"], "heads of 16 features cannot be stored in groups of 32"),
            (["--kv-format", "q4_0", "--engine", "parallel"], "groups of 32"),
            (["--kv-format", "kivi2", "--experiment", "transformers"], "groups of 32"),
            (["--kv-format", "kivi2:group=16"], "--experiment transformers alone"),
        ],
    )
    def test_what_cannot_be_is_refused_before_weights_are_read(self, options, told, here, tmp_path, monkeypatch):
        monkeypatch.setattr("sinkbench.models.loading._read_weights", lambda *a, **k: pytest.fail("weights were read"))
        status, _, error = here("run", *golden_options("llama"), "--output-dir", tmp_path, *options)
        assert (status, len(error.splitlines())) == (2, 1)
        assert told in error
        assert not list(tmp_path.iterdir())

    def test_a_format_is_called_by_what_differs_from_its_defaults(self):
        assert str(parse("kivi2:residual=128,group=32")) == "kivi2"
        assert str(parse("kivi2:residual=32,group=16")) == "kivi2:group=16,residual=32"
        assert parse(str(parse("kivi4:group=8"))) == parse("kivi4:group=8")
