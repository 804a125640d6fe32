"""Models built from the files of public repositories, where clones of them are at hand.

Clone facebookresearch/mae, facebookresearch/TimeSformer and real-stanford/diffusion_policy into one folder and name it:
``SPARSE_MHSA_REPOSITORIES=folder pytest tests/test_public_repositories.py``. TimeSformer needs einops, fvcore,
iopath, yacs, simplejson and portalocker as well.
"""

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL

pytest.importorskip("timm")
from sparse_mhsa.adapters.legacy import legacy_imports

FOLDER = Path(os.environ.get("SPARSE_MHSA_REPOSITORIES", "."))
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::SyntaxWarning")


class Calls(TorchDispatchMode):
    """Counts calls of our operators by name."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparse_mhsa":
            name = func.overloadpacket.__name__
            self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def repository(request, monkeypatch):
    """The files of a repository can be imported."""
    path = FOLDER / request.param
    if "SPARSE_MHSA_REPOSITORIES" not in os.environ or not path.is_dir():
        pytest.skip(f"no clone of {request.param}; see the docstring of this file")
    monkeypatch.syspath_prepend(str(path))


def check(model, run, config, layers, *, include=None, sample=None, without_gradient=(), atol=1e-10):
    """Full mask equal to dense, a sparse mask with its calls counted, checkpoints both ways, and back."""
    dense = copy.deepcopy(model)
    expected = run(dense)
    sm.sparsify(model, "mask: none", include=include)
    assert_same(run(model).detach(), expected.detach(), atol=atol)
    report = sm.sparsify(model, config, include=include, verify=True, sample=sample)
    assert len(report.swapped) == layers
    with Calls() as calls:
        out = run(model)
        out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, expected)
    assert calls.count["forward" if "forward" in calls.count else "forward_edges"] == layers
    assert sum(calls.count[name] for name in ("backward", "backward_edges") if name in calls.count) == layers
    for name, parameter in model.named_parameters():
        assert name.endswith(without_gradient) or torch.isfinite(parameter.grad).all(), name
    dense.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(dense.state_dict(), strict=True)
    sm.densify(model)
    assert_same(run(model).detach(), expected.detach(), atol=0.0)
    return report


@pytest.mark.parametrize("repository", ["mae"], indirect=True)
class TestMae:
    def test_pretraining_applies_masks_where_the_tokens_came_from(self, repository):
        with legacy_imports():
            from models_mae import MaskedAutoencoderViT

            model = MaskedAutoencoderViT(
                img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3, decoder_embed_dim=24, decoder_depth=2,
                decoder_num_heads=3,
            ).double()  # fmt: skip
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

        def run(model):
            torch.manual_seed(5)
            return model(x)[1]

        check(model, run, FIBOTTENTION, 3, without_gradient=("pos_embed",))
        sm.sparsify(model, LOCAL)
        places = []
        masking = model.random_masking

        def watched(*args):
            result = masking(*args)
            places.append(result[2].argsort(1)[:, : result[0].shape[1]])
            return result

        model.random_masking = watched
        attention = model.blocks[0].attn
        seen = []
        attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        attention.register_forward_hook(lambda _, args, out: seen.append(out))
        run(model)
        q, k, v = (t.transpose(1, 2) for t in attention.qkv(seen[0]).view(2, 17, 3, 3, 16).unbind(2))
        at = torch.cat((torch.zeros(2, 1, dtype=torch.long), places[0] + 1), 1)
        full = attention.mask(65).to_dense()
        kept = torch.stack([full[:, row][:, :, row] for row in at])
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        assert_same(seen[1].detach(), attention.proj(expected.transpose(1, 2).flatten(2)).detach(), atol=1e-12)

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
    def test_their_program_pretrains_resumes_and_finetunes_on_a_folder(self, repository, tmp_path, monkeypatch):
        pytest.importorskip("tensorboard")
        write_png = pytest.importorskip("torchvision.io").write_png
        for place in ("train/a", "val/a"):
            (tmp_path / place).mkdir(parents=True)
            for i in range(4):
                write_png((torch.rand(3, 64, 64) * 255).byte(), str(tmp_path / place / f"{i}.png"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        sizes["norm_layer"] = partial(nn.LayerNorm, eps=1e-6)

        def run(program, models, build, *options):
            def swapped(img_size=64, **kwargs):
                model = build(models, **kwargs)
                swaps.append(sm.sparsify(model, FIBOTTENTION, verify=True))
                return model

            arguments = (
                f"--model tiny --batch_size 2 --input_size 64 --device cpu --num_workers 0 --data_path {tmp_path}"
            )
            arguments = f"{arguments} --no_pin_mem --warmup_epochs 1 --output_dir {tmp_path} --log_dir {tmp_path}"
            models.tiny = swapped
            with Calls() as calls:
                program.main(program.get_args_parser().parse_args([*arguments.split(), *options]))
            assert calls.count["forward" if "forward" in calls.count else "forward_edges"] > 0
            assert sum(calls.count[name] for name in ("backward", "backward_edges") if name in calls.count) > 0

        def encoder(models, **kwargs):
            decoder = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}
            return models.MaskedAutoencoderViT(**sizes, **decoder, **kwargs)

        def classifier(models, **kwargs):
            return models.VisionTransformer(**sizes, qkv_bias=True, **kwargs)

        swaps = []
        with legacy_imports():
            import main_finetune
            import main_pretrain
            import models_mae
            import models_vit

            run(main_pretrain, models_mae, encoder, "--epochs", "1")
            first = str(tmp_path / "checkpoint-0.pth")
            run(main_pretrain, models_mae, encoder, "--epochs", "2", "--resume", first)
            last = str(tmp_path / "checkpoint-1.pth")
            run(main_finetune, models_vit, classifier, "--epochs", "1", "--nb_classes", "4", "--finetune", last)
            dense = encoder(models_mae)
            dense.load_state_dict(torch.load(last)["model"], strict=True)
        assert [len(report.swapped) for report in swaps] == [2, 2, 2]

    @pytest.mark.parametrize("pooled", [False, True])
    def test_finetuning(self, repository, pooled):
        with legacy_imports():
            from models_vit import VisionTransformer

            model = VisionTransformer(
                img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3, qkv_bias=True, num_classes=5,
                norm_layer=partial(nn.LayerNorm, eps=1e-6), **({"global_pool": True} if pooled else {}),
            ).double()  # fmt: skip
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        nn.init.normal_(model.head.weight)
        report = check(model, lambda model: model(x), FIBOTTENTION, 3)
        assert {row.num_tokens for row in report.swapped} == {65}


@pytest.mark.parametrize("repository", ["TimeSformer"], indirect=True)
class TestTimeSformer:
    @pytest.mark.parametrize(
        ("kind", "include", "layers"),
        [
            ("divided_space_time", None, 2),
            ("divided_space_time", "attn", 4),
            ("joint_space_time", None, 2),
            ("space_only", None, 2),
        ],
    )
    def test_every_kind_of_attention(self, repository, kind, include, layers):
        pytest.importorskip("einops")
        pytest.importorskip("fvcore")
        with legacy_imports():
            from timesformer.models.vit import VisionTransformer

            model = VisionTransformer(
                img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, num_frames=4,
                qkv_bias=True, attention_type=kind, drop_path_rate=0.0,
            ).double()  # fmt: skip
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        x = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
        report = check(model, lambda model: model(x), {**LOCAL, "num_prefix_tokens": 1}, layers, include=include)
        sizes = {row.num_tokens for row in report.swapped if "temporal" not in row.module}
        assert sizes == {65 if kind == "joint_space_time" else 17}


@pytest.mark.parametrize("repository", ["diffusion_policy"], indirect=True)
class TestDiffusionPolicy:
    @pytest.mark.parametrize(
        ("options", "layers"),
        [
            ({"cond_dim": 10, "n_cond_layers": 2}, 4),
            ({"cond_dim": 10}, 2),
            ({"time_as_cond": False}, 2),
        ],
        ids=["encoder and decoder", "decoder", "encoder"],
    )
    def test_with_its_float_masks(self, repository, options, layers):
        from diffusion_policy.model.diffusion.transformer_for_diffusion import TransformerForDiffusion

        model = TransformerForDiffusion(
            16, 16, 8, 4, n_emb=48, n_head=4, n_layer=2, causal_attn=True, p_drop_emb=0.0, p_drop_attn=0.0, **options
        ).double()
        for parameter in model.parameters():
            if parameter.numel():
                nn.init.normal_(parameter, std=0.2)
        inputs = {"sample": torch.randn(3, 8, 16, dtype=torch.float64), "timestep": torch.tensor(7)}
        if "cond_dim" in options:
            inputs["cond"] = torch.randn(3, 4, 10, dtype=torch.float64)
        model.time_emb.register_forward_hook(lambda _module, _args, out: out.double())
        local = {"mask": "local", "mask_kwargs": {"window": 2}}
        unused = ("_dummy_variable",)
        check(model, lambda model: model(**inputs), local, layers, include="self_attn", sample=inputs,
              without_gradient=unused)  # fmt: skip
        sm.sparsify(model, local, include="self_attn")
        # Its checks of every module and parameter.
        model.apply(model._init_weights)
        model.configure_optimizers()
