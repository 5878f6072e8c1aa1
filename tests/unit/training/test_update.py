"""ddpm/training/update.py without a GPU: Triton's interpreter gives what torch's clipping, Adam and average give, steps
that are recorded are those that are not, and what is compiled for a GPU spills nothing. tests/gpu has more."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import requires
from tests.unit.diffusion.test_kernels import interpreted, requires_triton_3_4, triton


@pytest.fixture(autouse=True)
def _triton() -> None:
    requires(triton, "torch came without Triton", "install a torch wheel for Linux x86-64")


SETTING = """
    import contextlib, copy, math
    import torch
    from torch import nn
    from ddpm.network.ema import EMA
    from ddpm.training import update as module
    from ddpm.training.progress import Window
    from ddpm.training.update import Update

    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    torch.manual_seed(0)
    BETAS = tuple(torch.tensor([0.9, 0.999]).tolist())  # as float32 has them
    ULP = 2.0**-23

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pointwise = nn.Conv2d(8, 60, 3), nn.Conv2d(8, 6, 1)
            self.whole, self.one = nn.Parameter(torch.randn(2048)), nn.Parameter(torch.randn(()))
            self.few, self.linear = nn.Parameter(torch.randn(3)), nn.Linear(65, 33)
            self.to(memory_format=torch.channels_last)

    def adam(model, kind=torch.optim.Adam, decay=0.0):
        return kind(model.parameters(), lr=1e-3, betas=BETAS, weight_decay=decay, fused=True)

    def scalar(value):
        return torch.tensor(value, dtype=torch.float32)

    def give(model, gradients):
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.clone(memory_format=torch.preserve_format)

    def gradients(model, scale=1.0):
        return [scale * torch.randn_like(p) for p in model.parameters()]

    def everything(model, average, optimizer):
        moments = [optimizer.state[p][n] for n in ("exp_avg", "exp_avg_sq", "step") for p in model.parameters()]
        return [t.detach().clone() for t in [*model.parameters(), *moments, *average.parameters()]]

    def bits(tensors):
        return [t.detach().contiguous().numpy().tobytes() for t in tensors]

    def close(ours, theirs, ulps=4):
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and a.dtype == torch.float32
            off = (a.double() - b.double()).abs().max() / b.double().abs().max()
            assert off <= ulps * ULP, (tuple(a.shape), float(off / ULP))
"""


def test_clipping_adam_and_average_are_torchs_to_four_units_in_the_last_place() -> None:
    """Of the largest value of each tensor, after each of five steps that torch takes in float64."""
    code = """
    for kind, decay, most in [
        (torch.optim.Adam, 0.0, 1.0),
        (torch.optim.Adam, 0.1, math.inf),
        (torch.optim.AdamW, 0.1, 300.0),  # clips some
    ]:
        ours = Network()
        theirs = copy.deepcopy(ours).double()
        average, ema = copy.deepcopy(ours), EMA(theirs, 0.99, warmup=True, every_steps=2)
        ema.model.double()
        one, other = adam(ours, kind, decay), adam(theirs, kind, decay)
        update, window = Update(ours, average, one, adam=True, max_norm=most), Window.empty(torch.device("cpu"))
        norms = 0.0
        for step in range(1, 6):
            lr, drawn = 1e-3 * step, gradients(ours, step)
            give(ours, drawn), give(theirs, [g.double() for g in drawn])
            if step == 3:  # laid out otherwise, and at an address that 16 does not divide
                ours.conv.weight.grad = ours.conv.weight.grad.contiguous()
                for p in (ours.whole, ours.few):
                    p.grad = torch.cat([torch.zeros(1), p.grad])[1:]
            decay_now = ema.decay_at(step)
            share = 0.0 if decay_now is None else 1.0 - decay_now
            norm, finite = update(scalar(0.5), scalar(lr), scalar(share), window)
            copied = [p for p, (at, _) in zip(ours.parameters(), update._wanted) if p.grad.data_ptr() != at]
            assert [id(p) for p in copied] == [id(ours.whole), id(ours.conv.weight)] * (step == 3)
            expected = nn.utils.clip_grad_norm_(theirs.parameters(), most)
            other.param_groups[0]["lr"] = lr
            other.step()
            ema.update(theirs, step)
            norms += float(expected)
            assert bool(finite) and finite.dtype == torch.bool and finite.shape == norm.shape == ()
            close([norm, window.loss, window.grad_norm], [expected, scalar(0.5 * step), scalar(norms)])
            close(everything(ours, average, one), everything(theirs, ema.model, other))
            print("close")
    """
    assert interpreted(SETTING + code).count("close") == 15


def test_gradients_in_bf16_move_all_as_their_values_in_float32_do() -> None:
    code = """
    for most in (math.inf, 0.01):
        found = []
        for narrow in (False, True):
            torch.manual_seed(1)
            model = Network()
            average, optimizer = copy.deepcopy(model), adam(model)
            update = Update(model, average, optimizer, adam=True, max_norm=most)
            window = Window.empty(torch.device("cpu"))
            for step in range(3):
                drawn = dict(zip(model.parameters(), (g.bfloat16() for g in gradients(model)), strict=True))
                drawn[model.whole] = torch.cat([torch.zeros(1), drawn[model.whole]]).bfloat16()[1:]
                drawn[model.conv.weight] = drawn[model.conv.weight].contiguous()  # laid out otherwise
                for p, g in drawn.items():
                    p.grad = None if narrow and p is not model.few else g.float()
                del drawn[model.few]
                update(scalar(0.5), scalar(1e-2), scalar(0.3), window, drawn if narrow else {})
            assert [is_narrow for _, is_narrow in update._wanted].count(True) == narrow * (len(drawn))
            found.append(bits(everything(model, average, optimizer) + [window.grad_norm]))
        assert found[0] == found[1]
        print("same")
    """
    assert interpreted(SETTING + code).count("same") == 2


def test_a_step_that_is_not_finite_moves_the_average_alone_and_counts_no_norm_that_is_not() -> None:
    code = """
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        model = Network()
        average, optimizer = copy.deepcopy(model), adam(model, kind, 0.1)
        update = Update(model, average, optimizer, adam=True, max_norm=1.0)
        give(model, gradients(model))
        update(scalar(1.0), scalar(1e-3), scalar(0.5), Window.empty(torch.device("cpu")))
        for loss, value in [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, -math.inf), (1.0, 3e38)]:
            before, expected = everything(model, average, optimizer), copy.deepcopy(average).requires_grad_(False)
            window, drawn = Window.empty(torch.device("cpu")), gradients(model)
            drawn[4].view(-1)[-1] += value
            give(model, drawn)
            norm, finite = update(scalar(loss), scalar(1e-3), scalar(0.25), window)
            assert not finite and bool(norm.isfinite()) is (value == 0.0)
            assert float(window.grad_norm) == (float(norm) if value == 0.0 else 0.0)
            assert float(window.loss) == loss or math.isnan(loss) and window.loss.isnan()
            after, num = everything(model, average, optimizer), len(list(model.parameters()))
            assert bits(after[:-num]) == bits(before[:-num])
            torch._foreach_lerp_(list(expected.parameters()), [p.detach() for p in model.parameters()], 0.25)
            close(after[-num:], list(expected.parameters()))
            assert bits(after[-num:]) != bits(before[-num:])
            print("kept")
    """
    assert interpreted(SETTING + code).count("kept") == 10


def test_an_average_that_is_not_due_keeps_its_bits_and_one_without_memory_takes_those_of_the_weights() -> None:
    code = """
    for with_adam in (True, False):
        model, average = Network(), Network()
        average.few.data.copy_(torch.tensor([-0.0, math.inf, math.nan]))
        optimizer = adam(model)
        update = Update(model, average, optimizer, adam=with_adam, max_norm=1.0)
        nowhere = Window.empty(torch.device("cpu"))

        def move(share):
            give(model, gradients(model))
            update(scalar(1.0), scalar(1e-3), share, nowhere) if with_adam else update.average(share)

        before, weights = bits(average.parameters()), bits(model.parameters())
        move(scalar(0.0))
        assert bits(average.parameters()) == before
        model.few.data[0] = -0.0
        model.few.data[1] = 1e38
        average.few.data[1] = -3e38  # their difference is infinite
        move(scalar(1.0))
        assert bits(average.parameters()) == bits(model.parameters()) != before
        assert (bits(model.parameters())[:1] != weights[:1]) is with_adam and bool(optimizer.state) is with_adam
        expected = copy.deepcopy(model)
        for share in (1e-4, 0.4999, 0.5, 0.9):
            for p in model.parameters():
                p.data.add_(torch.randn_like(p))
            average.load_state_dict(expected.state_dict())
            move(scalar(share))
            theirs = copy.deepcopy(expected).requires_grad_(False)
            torch._foreach_lerp_(list(theirs.parameters()), [p.detach() for p in model.parameters()], share)
            close(list(average.parameters()), list(theirs.parameters()), ulps=2)
        print("moved")
    """
    assert interpreted(SETTING + code).count("moved") == 2


def test_the_state_goes_on_in_torchs_adam_and_torchs_here() -> None:
    code = """
    import io
    found = {}
    for way in ("ours", "ours then torch", "torch then ours", "torch"):
        torch.manual_seed(1)
        model = Network()
        average, optimizer, nowhere = copy.deepcopy(model), adam(model), Window.empty(torch.device("cpu"))
        for half, name in enumerate(way.split(" then ") * (1 if "then" in way else 2)):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            optimizer = adam(model)
            optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            update = Update(model, average, optimizer, adam=True, max_norm=math.inf) if name == "ours" else None
            for step in range(2):
                give(model, gradients(model))
                update(scalar(1.0), scalar(1e-3), scalar(0.0), nowhere) if update else optimizer.step()
            for p in model.parameters():
                assert float(optimizer.state[p]["step"]) == 2 * half + 2
                assert list(optimizer.state[p]) == ["step", "exp_avg", "exp_avg_sq"]
        found[way] = optimizer.state_dict()["param_groups"], everything(model, average, optimizer)
    groups, values = zip(*found.values(), strict=True)
    assert groups[0] == groups[1] == groups[2] == groups[3]
    for value in values[:3]:
        close(value, values[3])
    # and a life of ours that goes on has the bits of one that never stopped
    assert bits(found["ours"][1]) != bits(found["torch"][1])
    torch.manual_seed(1)
    model = Network()
    average, optimizer = copy.deepcopy(model), adam(model)
    update = Update(model, average, optimizer, adam=True, max_norm=math.inf)
    for step in range(4):
        give(model, gradients(model))
        update(scalar(1.0), scalar(1e-3), scalar(0.0), nowhere)
    assert bits(everything(model, average, optimizer)) == bits(found["ours"][1])
    print("goes on")
    """
    assert interpreted(SETTING + code) == "goes on\n"


def test_kernels_that_compute_something_else_are_noticed_and_left_for_torchs() -> None:
    requires_triton_3_4()
    code = """
    import warnings
    from ddpm.training import update_kernels
    cpu = torch.device("cpu")
    assert not module.serves(cpu)  # which has none
    module.work_on = lambda device: True
    module.serves.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.serves(cpu)
    real = update_kernels.update_kernel
    class Wrong:
        def __getitem__(self, grid):
            return lambda *given, **options: real[grid](*given, **{**options, **wrong})
    update_kernels.update_kernel = Wrong()
    for wrong in ({"ADAM": False}, {"ADAMW": True}, {"ADAMW": False}, {"eps": 1e-2}, {"beta_2": 0.99}):
        module.serves.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert not module.serves(cpu)
        assert [str(w.message)[:42] for w in told] == ["updates on cpu take torch's kernels: Asser"]
    print("noticed")
    """
    assert interpreted(SETTING + code) == "noticed\n"


def test_a_recorded_update_is_told_of_its_gradients_before_it_is_replayed() -> None:
    """Recording is played: kernels are kept instead of run, and a copy from the host is an error."""
    code = """
    kept, recording = [], False
    def play(kernel):
        class Played:
            def __getitem__(self, grid):
                def launch(*arguments, **options):
                    run = lambda: kernel[grid](*arguments, **options)
                    kept.append(run) if recording else run()
                return launch
        return Played()
    for name in ("squares_kernel", "factors_kernel", "update_kernel"):
        from ddpm.training import update_kernels
        setattr(update_kernels, name, play(getattr(update_kernels, name)))
    module.recording = lambda device: recording
    found = []
    for replayed in (True, False):
        torch.manual_seed(2)
        model, nowhere = Network(), Window.empty(torch.device("cpu"))
        average, optimizer = copy.deepcopy(model), adam(model)
        update = Update(model, average, optimizer, adam=True, max_norm=1.0)
        copied = []
        real = torch.Tensor.copy_
        drawn = [gradients(model) for _ in range(4)]
        give(model, drawn[0])
        loss, lr, share = scalar(1.0), scalar(1e-3), scalar(0.1)
        update(loss, lr, share, nowhere)
        static = [torch.empty_like(p) for p in model.parameters()]
        for step in (1, 2, 3):
            lr.fill_(1e-3 * step), share.fill_(0.1 * step)
            if step == 1 and replayed:
                before = update._gradients.clone()
                for p, g in zip(model.parameters(), static, strict=True):
                    p.grad = g
                recording = True
                update(loss, lr, share, nowhere)
                recording = False
                assert torch.equal(update._gradients, before) and len(kept) == 3
                update.tell()
                assert not torch.equal(update._gradients, before)
                model.zero_grad(set_to_none=True)
            if replayed:
                for g, value in zip(static, drawn[step], strict=True):
                    g.copy_(value)
                for run in kept:
                    run()
            else:
                give(model, drawn[step])
                update(loss, lr, share, nowhere)
        found.append(bits(everything(model, average, optimizer)) + bits([nowhere.loss, nowhere.grad_norm]))
    assert found[0] == found[1]
    print("same")
    """
    assert interpreted(SETTING + code) == "same\n"


LIVES = """
    import contextlib, dataclasses, math, tempfile
    from pathlib import Path
    import torch
    from ddpm.run import generations
    from ddpm.training import replay, step as step_module, update as module, update_kernels
    from ddpm.training.ranks import World
    from ddpm.training.replay import Exchange
    from ddpm.training.update import Update
    from tests import training as helpers
    from tests.training import CPU, Life, differences, events, lines, make_config, make_run, poison

    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    step_module.serves = lambda device: True
    step_module.Ring = type("Ring", (), {"pinned": lambda self, parts: parts, "used": lambda self: None})
    replay.dist.all_reduce = lambda flat: flat
    real_resolve = helpers.resolve
    SMALL = {"model__channel_mults": [1], "model__attention_resolutions": [], "model__middle_attention": False}
    CHANGES = {**SMALL, "train__ema_every_steps": 2, "train__ema_start_step": 3, "train__ema_warmup": True}

    class Recorder:
        '''A GPU's recording, played: the update's kernels are kept, and run when it is replayed; gradients are computed
        anew then, into the recorded ones.'''

        recording, launches = False, 0

        def __init__(self):
            self.kernels, self.given, Recorder.now = [], None, self

        def replay(self):
            step = Recorder.step
            given = step.unpacked(step._replay._static)
            if self is step._replay._first:
                Recorder.loss = step.gradients(given)
            if self.kernels:
                model, (gradients, loss, lr, share) = step.state.model, self.given
                if step.exchange is not None:
                    step.exchange._flat /= step.world.world_size
                else:
                    for g, p in zip(gradients, model.parameters(), strict=True):
                        g.copy_(p.grad)
                loss.copy_(Recorder.loss), lr.copy_(given.lr), share.copy_(given.share)
                for run in self.kernels:
                    run()
                step.state.optimizer.zero_grad(set_to_none=True)

        def pool(self):
            return None

    @contextlib.contextmanager
    def recorded(graph, pool=None):
        Recorder.now, Recorder.recording = graph, True
        yield
        Recorder.recording = False

    def play(kernel):
        def launcher(grid):
            def launch(*arguments, **options):
                Recorder.launches += 1
                run = lambda: kernel[grid](*arguments, **options)
                Recorder.now.kernels.append(run) if Recorder.recording else run()
            return launch
        return type("Played", (), {"__getitem__": lambda self, grid: launcher(grid)})()

    for name in ("squares_kernel", "factors_kernel", "update_kernel"):
        setattr(update_kernels, name, play(getattr(update_kernels, name)))
    real_call = Update.__call__

    def noted(self, loss, lr, share, window, narrow={}):
        assert not narrow  # these lives are in float32
        if Recorder.recording:
            gradients = [p.grad for p in self._parameters]
            Recorder.now.given = gradients, loss, lr, share
        return real_call(self, loss, lr, share, window, narrow)

    Update.__call__ = noted
    module.recording = lambda device: Recorder.recording
    replay.recorded, torch.cuda.CUDAGraph = recorded, Recorder

    def on_a_gpu(replays=True, exchange=False):
        def begin(trainer):
            step = Recorder.step = trainer.step
            step.gpu = True
            if exchange:
                step.exchange = Exchange(trainer.state.model.parameters(), trainer.world)
        step_module.Step.replays = replays
        helpers.resolve = lambda *given: dataclasses.replace(real_resolve(*given), kernels="own")
        return begin

    def ended(name, *, begin, stops=(), hurt=None, **changes):
        config = make_config(**{**CHANGES, "train__grad_clip": 0.5, **changes})
        run = make_run(Path(tempfile.mkdtemp()) / name)
        for stop in [*stops, None]:
            with Life(config, run, before_resume=begin) as life:
                if hurt is not None:
                    poison(life.trainer, lambda t: t.at.step == hurt and t.at.attempt == 0)
                life.train(stop_at=[stop] if stop else [])
                recorded = life.trainer.step._replay is not None
                assert recorded is (step_module.Step.replays is True and life.trainer.step.gpu)
        return generations.load(run, 8), lines(run), events(run)

    def same(one, other):
        return differences(one[0], other[0]) == [] and one[1] == other[1]
"""


def test_lives_whose_updates_are_replayed_end_with_the_bits_of_those_taken_kernel_by_kernel() -> None:
    """Stopped, rolled back, and with gradients that several ranks exchange; near to a life of torch's update."""
    requires_triton_3_4()
    code = """
    calm = ended("calm", begin=on_a_gpu())
    assert Recorder.launches == 3 * (1 + 1 + 1)  # to compile, the first step, its recording
    assert same(calm, ended("one by one", begin=on_a_gpu(replays=False)))
    assert same(calm, ended("stopped", begin=on_a_gpu(exchange=True), stops=[5]))
    changes = {"checkpoint__every_steps": 3}
    hurt = [ended(str(replays), begin=on_a_gpu(replays), hurt=4, **changes) for replays in (True, False)]
    assert same(*hurt) and not same(calm, hurt[0]) and hurt[0][2].count("rollback") == 1
    helpers.resolve = real_resolve
    step_module.Step.replays = False
    theirs = ended("torch", begin=lambda trainer: None)
    assert calm[0].keys() == theirs[0].keys() and [r["step"] for r in calm[1]] == [r["step"] for r in theirs[1]]
    moved = [calm[0]["ema"], theirs[0]["ema"]]
    for ours, others in (moved, [calm[0]["model"], theirs[0]["model"]]):
        assert ours.keys() == others.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], others[name], rtol=1e-3, atol=1e-4)
    for ours, others in zip(calm[1], theirs[1], strict=True):
        assert abs(ours["loss"] / others["loss"] - 1) < 1e-4 and abs(ours["grad_norm"] / others["grad_norm"] - 1) < 1e-3
    moments = [state[0]["optimizer"] for state in (calm, theirs)]
    assert moments[0]["param_groups"] == moments[1]["param_groups"]
    assert moments[0]["state"].keys() == moments[1]["state"].keys()
    for i, named in moments[0]["state"].items():
        assert list(named) == list(moments[1]["state"][i]) and named["step"] == moments[1]["state"][i]["step"] == 8
    print("same")
    """
    assert interpreted(LIVES + code).splitlines()[-1] == "same"


def test_lives_whose_steps_cannot_be_recorded_go_on_kernel_by_kernel_with_the_same_bits() -> None:
    code = """
    import warnings
    calm = ended("calm", begin=on_a_gpu())
    where = {}

    @contextlib.contextmanager
    def failing(graph, pool=None):
        with recorded(graph, pool):
            yield
            where["failed"] = len(graph.kernels)
        raise torch.OutOfMemoryError("of a second copy")

    replay.recorded = failing
    begin = on_a_gpu()
    step_module.Step.replays = 1  # they are tried, and `ended` expects none
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert same(calm, ended("not recorded", begin=begin, stops=[5]))
    assert where == {"failed": 3}
    assert [str(w.message) for w in told if "replayed" in str(w.message)] == [
        "steps are not replayed: OutOfMemoryError: of a second copy"
    ] * 2
    print("same")
    """
    assert interpreted(LIVES + code).splitlines()[-1] == "same"


def test_its_kernels_compile_for_a_gpu_move_four_numbers_at_a_time_and_spill_none(tmp_path: Path) -> None:
    requires_triton_3_4()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddpm.training import update_kernels as kernels

    kinds = dict.fromkeys(("places", "gradients"), "*i64") | {"finite": "*u8", "chunks": "i32", "counters": "i32"}
    float_32 = ("partials", "factors", "norm", "sum_of_losses", "sum_of_norms", "counts", "loss", "lr", "share")
    kinds |= dict.fromkeys(float_32, "*fp32")
    chunk = {"CHUNK": kernels.CHUNK, "ROW": kernels.ROW}
    ways = [  # how many times the float32 of a chunk are read, or half of them as bf16, and written
        (kernels.squares_kernel, chunk, 4, 1.5, 0),
        (kernels.factors_kernel, {"SUMMED": kernels.SUMMED, "COUNTERS": kernels.padded(300)}, 8, 0, 0),
        (kernels.update_kernel, {**chunk, "ADAM": True, "ADAMW": True}, 8, 5.5, 4),
        (kernels.update_kernel, {**chunk, "ADAM": True, "ADAMW": False}, 8, 5.5, 4),
        (kernels.update_kernel, {**chunk, "ADAM": False, "ADAMW": False}, 8, 2, 1),
    ]
    for kernel, constants, warps, loads, stores in ways:
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in constants else kinds.get(n, "fp32") for n in names},
            constexprs=constants,
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n in kinds and "*" in kinds[n]},
        )
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        words = kernels.CHUNK // (32 * warps * 4) * (constants.get("CHUNK") is not None)
        ptx = made.asm["ptx"]
        assert ptx.count("ld.global.v4") == words * loads and ptx.count("st.global.v4") == words * stores, constants
        (tmp_path / "it.cubin").write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", tmp_path / "it.cubin"], capture_output=True, text=True, check=True)
        assert " STACK:0 " in usage.stdout and " LOCAL:0 " in usage.stdout, usage.stdout
