import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lrqdit
from lrqdit.calibration import runs
from lrqdit.calibration.observer import Observer, Sampling
from lrqdit.calibration.steps import Calibration, Call, Step
from lrqdit.errors import CheckpointError
from lrqdit.packed import checkpoint, files, linear
from lrqdit.packed.checkpoint import stored_tensors
from lrqdit.packed.format import DTYPE_BYTES
from lrqdit.packed.linear import QuantLinear


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.norm = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.LayerNorm(16)

    def forward(self, x):
        x = self.norm(x)
        return self.q(x) * self.k(x)


def build(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(Block(), Block()).eval()


X = random(32, 16)


def run(model):
    with torch.no_grad():
        return model(X)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved quantized module's folder and its output."""
    model = build()
    lrqdit.quantize(model, "w3a8", forward_loop=run, show_progress=False, rotation="outlier")
    folder = tmp_path_factory.mktemp("saved") / "deep" / "folder"
    lrqdit.save_checkpoint(model, folder)
    return folder, run(model)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def edit_json(path, **changes):
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_header(path, edit):
    """Change the header of a safetensors file; the tensors stay as they are."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header = edit(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_round_trip(saved):
    folder, y = saved
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    model = lrqdit.load_checkpoint(build(seed=1), folder)
    assert torch.equal(run(model), y)
    assert model[0].k.shared_input is model[0].q.shared_input
    config = json.loads((folder / "config.json").read_text())
    assert (config["quant_method"], config["format_version"]) == ("lrqdit", 1)
    assert config["settings"]["weight_bits"] == 3 and set(config["layers"]) == {"0.q", "0.k", "1.q", "1.k"}


def test_round_trip_in_another_dtype(saved):
    model = lrqdit.load_checkpoint(build(seed=1).bfloat16(), saved[0])
    assert model[0].norm.weight.dtype == torch.bfloat16 and model[0].q.weight.dtype == torch.bfloat16
    stored = load_file(saved[0] / "model.safetensors")
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items() if not v.is_floating_point())
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    model = lrqdit.load_checkpoint(build(), saved[0])
    lrqdit.save_checkpoint(model, tmp_path, json.loads((saved[0] / "config.json").read_text())["settings"])
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved[0] / name).read_bytes()


def test_settings_survive_loading(saved, tmp_path):
    model = lrqdit.load_checkpoint(build(), saved[0])
    lrqdit.save_checkpoint(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (saved[0] / "config.json").read_bytes()


def test_tied_weights(tmp_path):
    model = build()
    model[1].norm.weight = model[0].norm.weight
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    lrqdit.save_checkpoint(model, tmp_path)
    assert torch.equal(run(lrqdit.load_checkpoint(build(1), tmp_path)), run(model))


def test_nothing_to_save(tmp_path):
    with pytest.raises(CheckpointError, match="has no quantized layer to save"):
        lrqdit.save_checkpoint(build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_and_folders_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino) or sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append((old.name, new.name)) or replace(old, new))
    number = tmp_path.stat().st_ino
    files.write_atomically(tmp_path / "file", lambda path: path.write_text("new"))
    assert done == [(tmp_path / "file").stat().st_ino, ("file.partial", "file"), number]

    done.clear()
    folder = tmp_path / "folder"
    for text in ("old", "new"):
        files.write_folder_atomically(folder, lambda path, text=text: (path / "file").write_text(text))
    synced = (folder / "file").stat().st_ino, folder.stat().st_ino
    names = ("folder", "folder.replaced"), ("folder.writing", "folder")
    assert tuple(done[-5:]) == (*synced, *names, number) and (folder / "file").read_text() == "new"

    def fail(path):
        (path / "file").write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        files.write_folder_atomically(folder, fail)
    assert (folder / "file").read_text() == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_the_two_tables_of_dtypes_agree():
    assert {name: dtype.itemsize for name, dtype in linear.DTYPES.items()} == DTYPE_BYTES


def test_a_failed_save_leaves_no_half_file(saved, folder, monkeypatch):
    model = lrqdit.load_checkpoint(build(), saved[0])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def failing(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        lrqdit.save_checkpoint(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def rename_tensor(header):
    header["0.q.other"] = header.pop("0.q.packed")


def drop_last(header):
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    del header[last]


def set_dtype(name, dtype):
    def edit(header):
        header[name]["dtype"] = dtype

    return edit


def set_shape(name, shape):
    def edit(header):
        header[name]["shape"] = shape

    return edit


WEIGHTS, CONFIG = "model.safetensors", "config.json"
CORRUPTIONS = {
    "config is missing": (lambda f: (f / CONFIG).unlink(), r"config\.json is missing"),
    "weights are missing": (lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "folder is missing": (shutil.rmtree, r"config\.json is missing"),
    "not JSON": (lambda f: (f / CONFIG).write_text("{"), "is not readable JSON"),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "is not readable JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "holds a JSON list, not an object"),
    "of another tool": (lambda f: edit_json(f / CONFIG, quant_method="gguf"), "not a configuration written by"),
    "newer": (lambda f: edit_json(f / CONFIG, format_version=2), "version 2, .* reads version 1; upgrade lrqdit"),
    "no version": (lambda f: edit_json(f / CONFIG, format_version=None), "version None"),
    "no layers": (lambda f: edit_json(f / CONFIG, layers=None), "lists no layers"),
    "layers are a list": (lambda f: edit_json(f / CONFIG, layers=[1]), "lists no layers"),
    "layer is a number": (lambda f: edit_json(f / CONFIG, layers={"0.q": 4}), "layer format 4 is not readable"),
    "truncated": (lambda f: truncate(f / WEIGHTS, -10), "its header describes"),
    "truncated in the header": (lambda f: truncate(f / WEIGHTS, 100), "is truncated"),
    "truncated in the length": (lambda f: truncate(f / WEIGHTS, 5), "is truncated"),
    "empty": (lambda f: truncate(f / WEIGHTS, 0), "is truncated"),
    "longer": (lambda f: append(f / WEIGHTS), "its header describes"),
    "huge header": (lambda f: overwrite(f / WEIGHTS, struct.pack("<Q", 1 << 60)), "is truncated"),
    "header is garbage": (lambda f: overwrite(f / WEIGHTS, b"\x10" + 7 * b"\0" + b"garbage"), "damaged header"),
    "tensor renamed": (lambda f: edit_header(f / WEIGHTS, rename_tensor), "does not fit Sequential"),
    "tensor lost": (lambda f: edit_header(f / WEIGHTS, drop_last), "its header describes"),
    "bits as floats": (lambda f: edit_header(f / WEIGHTS, set_dtype("0.q.bias_bits", "F32")), "stored as F32"),
    "floats as bits": (lambda f: edit_header(f / WEIGHTS, set_dtype("0.norm.bias", "I32")), "stored as I32"),
    "sign lost": (lambda f: edit_header(f / WEIGHTS, set_dtype("0.q.table", "U8")), "stored as U8"),
    "other dtype": (lambda f: edit_header(f / WEIGHTS, set_dtype("0.q.bias_bits", "Q4")), "damaged header"),
    "other shape": (lambda f: edit_header(f / WEIGHTS, set_shape("0.q.bias_bits", [4, 4])), "does not fit"),
    "wrong size": (lambda f: edit_header(f / WEIGHTS, set_shape("0.q.bias_bits", [15])), "damaged header"),
    "header is a list": (lambda f: edit_header(f / WEIGHTS, lambda h: [h]), "damaged header"),
    "deep header": (lambda f: edit_header(f / WEIGHTS, nest), "damaged header"),
}  # fmt: skip


def nest(_):
    return json.loads("[" * 900 + "]" * 900)


def truncate(path, size):
    data = path.read_bytes()
    path.write_bytes(data[:size])


def append(path):
    path.write_bytes(path.read_bytes() + b"\0" * 16)


def overwrite(path, start):
    path.write_bytes(start + path.read_bytes()[len(start) :])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption(folder, kind):
    corrupt, message = CORRUPTIONS[kind]
    corrupt(folder)
    with pytest.raises(CheckpointError, match=message):
        lrqdit.load_checkpoint(build(), folder)


def test_another_model(saved):
    with pytest.raises(CheckpointError, match=r"quantizes 0\.[qk] as 16 x 16, but this Sequential has no such layer"):
        lrqdit.load_checkpoint(nn.Sequential(nn.Linear(16, 16)), saved[0])
    other = build()
    other[1].k = nn.Linear(16, 8)
    with pytest.raises(CheckpointError, match=r"1\.k as 16 x 16, but this Sequential has 8 x 16 there"):
        lrqdit.load_checkpoint(other, saved[0])
    more = build()
    more.append(nn.Linear(16, 16))
    with pytest.raises(CheckpointError, match="does not fit Sequential"):
        lrqdit.load_checkpoint(more, saved[0])


@pytest.mark.parametrize("owner", ["1.q", "nobody", "0.k"])
def test_wrong_owner_of_a_shared_input(folder, owner):
    config = json.loads((folder / "config.json").read_text())
    config["layers"]["0.k"]["input_from"] = owner
    if owner == "1.q":
        config["layers"]["1.q"]["clip"] = 0.123
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"0\.k shares the input of"):
        lrqdit.load_checkpoint(build(), folder)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_headers_never_load_as_something_else(saved, tmp_path_factory, data):
    """Flip bytes of the header, or cut the file: an error of ours, or exactly the tensors that were saved."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    shutil.copy(saved[0] / "config.json", folder)
    original = (saved[0] / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", original[:8])[0]
    damaged = bytearray(original)
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    else:
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    (folder / "model.safetensors").write_bytes(bytes(damaged))
    try:
        model = lrqdit.load_checkpoint(build(1), folder)
    except CheckpointError:
        return
    expected = load_file(saved[0] / "model.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in stored_tensors(model.state_dict()).items())


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(["in_features", "weight_bits", "clip", "rotation", "factors", "input_from", "table_rows"]),
)
def test_damaged_layer_formats(saved, tmp_path_factory, value, key):
    folder = tmp_path_factory.getbasetemp() / "fuzz_config"
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    config = json.loads((saved[0] / "config.json").read_text())
    config["layers"]["0.q"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = lrqdit.load_checkpoint(build(1), folder)
    except CheckpointError:
        return
    assert run(model).shape == (32, 16)


def test_sharded_folder(tmp_path):
    tensors = {"a": random(4), "b": random(5)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(files.check_model_folder(tmp_path)) == ["a", "b"]
    for bad, message in [
        ({**weight_map, "b": "../b.safetensors"}, "lies outside its folder"),
        ({**weight_map, "b": "/etc/passwd"}, "lies outside its folder"),
        ({**weight_map, "b": 7}, "has no weight_map"),
        ({**weight_map, "c": "b.safetensors"}, "lacks the tensor c"),
        ({**weight_map, "c": "c.safetensors"}, r"c\.safetensors is missing"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(CheckpointError, match=message):
            files.check_model_folder(tmp_path)


def test_index_of_unhashable_files(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": ["x"], "b": {}}}))
    with pytest.raises(CheckpointError):
        files.check_model_folder(tmp_path)


def test_pipeline_folder(copy_of_pipeline, edit_json):
    index = files.check_pipeline_folder(copy_of_pipeline)
    assert index["_class_name"] == "PixArtAlphaPipeline"
    weights = copy_of_pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="its header describes"):
        files.check_pipeline_folder(copy_of_pipeline)
    weights.write_bytes(data)
    edit_json(copy_of_pipeline / "model_index.json", **{"../transformer": ["diffusers", "X"]})
    with pytest.raises(CheckpointError, match="lists the component"):
        files.check_pipeline_folder(copy_of_pipeline)


@pytest.mark.parametrize("entry", [[None, None], [], "text", False, 3])
def test_entries_that_are_no_components(copy_of_pipeline, edit_json, entry):
    edit_json(copy_of_pipeline / "model_index.json", extra=entry)
    assert files.check_pipeline_folder(copy_of_pipeline)["extra"] == entry


def test_not_a_pipeline(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        files.check_pipeline_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        files.check_pipeline_folder(tmp_path)


def test_run_folder(tmp_path, caplog):
    tensors, values = {"x": random(3, 4).t(), "y": torch.arange(3)}, {"names": ["a"], "error": 0.1 + 0.2}
    with runs.RunFolder(tmp_path / "run", {"settings": "one", "weights": "w"}) as folder:
        folder.save("part", tensors, values)
    with runs.RunFolder(tmp_path / "run", {"settings": "one", "weights": "w"}) as again:
        loaded, read = again.load("part")
        assert read == values and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
        assert again.load("other") is None and again.load_calibration() is None
        assert not caplog.records
        truncate(tmp_path / "run" / "part.safetensors", -1)
        assert again.load("part") is None and "part.safetensors is damaged and computed again" in caplog.text
    with runs.RunFolder(tmp_path / "run", {"settings": "two", "weights": "w"}) as other:
        assert other.load("part") is None  # emptied
    assert f"{tmp_path / 'run'}: starts again, because these differ: settings (was one, now two)" in caplog.text


def test_one_run_at_a_time(tmp_path):
    """While a run has its folder another process is refused, and nothing of the folder is lost."""
    script = (
        "import sys; from lrqdit.calibration.runs import RunFolder; from lrqdit.errors import CheckpointError\n"
        "try: RunFolder(sys.argv[1], {'settings': 'two'})\n"
        "except CheckpointError as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with runs.RunFolder(tmp_path / "run", {"settings": "one"}) as folder:
        folder.save("part", {}, {"a": 1})
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=with_this_package()).stdout
        assert "is in use by another run; wait for it to end, or pass another folder" in output
        assert folder.load("part")[1] == {"a": 1}
    assert subprocess.run(command, check=True, capture_output=True, text=True, env=with_this_package()).stdout == ""


def with_this_package():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(lrqdit.__file__).parents[1]), *sys.path])}


@pytest.mark.parametrize("content", ["", '{"a', "[]"])
def test_damaged_marks_of_a_run(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / runs.MARKS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"marks\.json .*; remove \S+run, an unfinished run, and start again"):
        runs.RunFolder(tmp_path / "run", {})
    shutil.rmtree(tmp_path / "run")  # as advised
    runs.RunFolder(tmp_path / "run", {}).close()


def test_run_folder_killed_at_its_start(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{runs.MARKS_FILE}.partial").write_text("on")
    runs.RunFolder(tmp_path / "run", {}).close()


def test_run_folder_keeps_the_calibration(tmp_path):
    model = build()
    with Observer(model, ("0.q", "0.k", "1.q", "1.k"), Sampling(20, 0)) as observer:
        run(model)
    groups = observer.groups()
    calls = [Call.record((random(2, 3, seed=i),), {"more": {"mask": None, "pair": (1, random(4))}}) for i in range(3)]
    steps = [Step(calls[:2], (3.0, -2.0), (2, 3)), Step(calls[2:])]
    with runs.RunFolder(tmp_path / "run", {}) as folder:
        folder.save_calibration(Calibration(groups, steps))
    with runs.RunFolder(tmp_path / "run", {}) as folder:
        again = folder.load_calibration()
    assert [g.names for g in again.groups] == [g.names for g in groups] == [["0.q", "0.k"], ["1.q", "1.k"]]
    for one, two in zip(groups, again.groups, strict=True):
        assert torch.equal(one.stats.tokens, two.stats.tokens) and one.stats.rms == two.stats.rms
    for one, two in zip(steps, again.steps, strict=True):
        assert (one.weights, one.shape) == (two.weights, two.shape)
        for a, b in zip(one.calls, two.calls, strict=True):
            assert a.structure == b.structure and all(map(torch.equal, a.tensors, b.tensors))


def test_marks_of_a_run():
    one = runs.describe_run(build(), settings={"a": 2})
    assert one == runs.describe_run(build(), settings={"a": 2})
    assert one["lrqdit version"] == lrqdit.__version__

    def changed(module, **values):
        two = runs.describe_run(module, **values)
        return [name for name in one if one[name] != two[name]]

    other = build()
    other[1].k.weight.data[-1, -1] += 1  # the very last weight
    assert changed(other, settings={"a": 2}) == ["model's weights"]
    assert changed(build().double(), settings={"a": 2}) == ["model's weights"]
    assert changed(build(), settings={"a": 3}) == ["settings"]


def test_golden_names(saved):
    """Names, dtypes and shapes are the format: changing one needs another format version."""
    tensors = load_file(saved[0] / "model.safetensors")
    found = {k: (str(v.dtype), tuple(v.shape)) for k, v in tensors.items() if k.startswith("0.")}
    assert found == {
        "0.norm.weight": ("torch.float32", (16,)),
        "0.norm.bias": ("torch.float32", (16,)),
        "0.q.packed": ("torch.uint8", (1, 1, 96)),
        "0.q.table": ("torch.int8", (1, 16)),
        "0.q.row_scale_bits": ("torch.int32", (16,)),
        "0.q.bias_bits": ("torch.int32", (16,)),
        "0.q.input_offset_bits": ("torch.int16", (16,)),
        "0.q.block1_bits": ("torch.int32", (16, 16)),
        "0.q.block2_bits": ("torch.int32", (16, 16)),
        "0.q.permutation": ("torch.int32", (16,)),
        **({"0.q.input_scale_bits": ("torch.int16", (16,))} if "0.q.input_scale_bits" in found else {}),
        "0.k.packed": ("torch.uint8", (1, 1, 96)),
        "0.k.table": ("torch.int8", (1, 16)),
        "0.k.row_scale_bits": ("torch.int32", (16,)),
        "0.k.bias_bits": ("torch.int32", (16,)),
    }
    assert isinstance(lrqdit.load_checkpoint(build(), saved[0])[0].q, QuantLinear)
