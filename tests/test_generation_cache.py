"""``generate`` of transformers with caches that forget, against the dense model and against caches written as lists."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from cache_oracle import CacheOracle
from comparison import assert_same
from sparse_mhsa import CachePolicy

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
POLICIES = {
    "full": {},
    "sliding_window": {},
    "attention_sinks": {"sinks": 2},
    "score_based": {},
    "combined": {"recent": 2, "sinks": 1},
    "norm_based": {"recent": 1},
}
NONE = {"mask": "none"}
ORACLE = "sparse_mhsa_test_cache_oracle"
PROMPT, NEW = 9, 8

every_policy = pytest.mark.parametrize(("name", "options"), POLICIES.items(), ids=str)
padded_or_not = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


def local(window):
    return {"mask": "local", "mask_kwargs": {"window": window, "causal": True}}


def decoder(family="Llama", **options):
    """In float64, with weights that are large enough for attention to matter."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def swapped(model, config=NONE):
    model = copy.deepcopy(model)
    sm.sparsify(model, config, include=r"attn|attention$")
    return model


def policy_of(name, capacity, options):
    return CachePolicy(name, capacity=None if name == "full" else capacity, **options)


def prompts(padded=False, tokens=PROMPT, samples=2):
    ids = torch.randint(2, 50, (samples, tokens), generator=torch.Generator().manual_seed(3))
    real = torch.ones(samples, tokens, dtype=torch.long)
    if padded:
        real[1, :4] = 0
        ids[1, :4] = 1
    return {"input_ids": ids, "attention_mask": real}


def generated(model, inputs, tokens=NEW, **options):
    options = {"max_new_tokens": tokens, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def assert_generates(got, expected, atol=1e-9):
    assert torch.equal(got.sequences, expected.sequences)
    assert_same(torch.stack(got.logits), torch.stack(expected.logits), atol=atol, what="logits")


def attend_by_the_oracle(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of the new tokens alone to a cache of the oracle's; transformers' own cache keeps everything."""
    new = query.shape[2]
    if key.shape[2] == new:
        module.oracle = CacheOracle(*module.definition, batch=query.shape[0], **module.options)
    real = None
    if attention_mask is not None:
        real = attention_mask[:, 0, :, -new:].diagonal(dim1=1, dim2=2)
    tensors = (x[:, :, -new:].detach().numpy() for x in (query, key, value))
    out, _ = module.oracle.attend(*tensors, real=real, scale=scaling)
    return torch.from_numpy(out).transpose(1, 2), None


def by_the_oracle(model, name, capacity, **options):
    """The dense model, with a cache that is its definition in every layer."""
    transformers.AttentionInterface.register(ORACLE, attend_by_the_oracle)
    transformers.AttentionMaskInterface.register(ORACLE, transformers.masking_utils.sdpa_mask)
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.definition = name, [capacity] * SIZES["num_key_value_heads"]
        layer.self_attn.options = options
    model.config._attn_implementation = ORACLE
    return model


class TestWhileNothingIsForgotten:
    @padded_or_not
    @every_policy
    @pytest.mark.parametrize("family", ["Llama", "Mistral"])
    def test_it_generates_what_the_dense_model_does(self, family, name, options, padded):
        model, inputs = decoder(family), prompts(padded)
        expected = generated(model, inputs)
        sparse = swapped(model)
        cache = sm.generation_cache(sparse, policy_of(name, PROMPT + NEW, options))
        assert_generates(generated(sparse, inputs, cache=cache), expected)
        assert_generates(generated(sparse, inputs, use_cache=False), expected)
        assert_generates(generated(sparse, inputs), expected)

    @pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma", "Phi3", "Olmo2", "StableLm", "Starcoder2", "Cohere"])
    def test_other_decoders(self, family):
        model, inputs = decoder(family), prompts(padded=True)
        expected = generated(model, inputs)
        sparse = swapped(model)
        cache = sm.generation_cache(sparse, CachePolicy("score_based", 40))
        assert_generates(generated(sparse, inputs, cache=cache), expected, atol=1e-6)

    @padded_or_not
    @every_policy
    def test_a_causal_window_is_that_of_the_whole_sequence(self, name, options, padded):
        model, inputs = swapped(decoder(), local(3)), prompts(padded)
        expected = generated(model, inputs, use_cache=False)
        cache = sm.generation_cache(model, policy_of(name, PROMPT + NEW, options))
        assert_generates(generated(model, inputs, cache=cache), expected)

    @every_policy
    def test_the_window_of_the_model_itself(self, name, options):
        model, inputs = decoder("Mistral", sliding_window=4), prompts(padded=True)
        expected = generated(model, inputs)
        sparse = swapped(model)
        cache = sm.generation_cache(sparse, policy_of(name, PROMPT + NEW, options))
        assert_generates(generated(sparse, inputs, cache=cache), expected)

    @every_policy
    def test_beam_search(self, name, options):
        model, inputs = decoder(), prompts(padded=True)
        beams = {"num_beams": 3, "num_return_sequences": 2}
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **beams)
        sparse = swapped(model)
        cache = sm.generation_cache(sparse, policy_of(name, PROMPT + NEW, options))
        got = sparse.generate(**inputs, max_new_tokens=NEW, do_sample=False, cache=cache, **beams)
        assert torch.equal(got, expected)

    @pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
    def test_by_the_earlier_name_and_under_sampling(self):
        model, inputs = decoder(), prompts()
        torch.manual_seed(5)
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=True)
        sparse = swapped(model)
        cache = sm.generation_cache(sparse, CachePolicy("full"))
        torch.manual_seed(5)
        got = sparse.generate(**inputs, max_new_tokens=NEW, do_sample=True, past_key_values=cache)
        assert torch.equal(got, expected)


class TestForgetting:
    @padded_or_not
    @pytest.mark.parametrize("window", [None, 3])
    @every_policy
    def test_it_generates_by_the_definition_of_the_policy(self, name, options, window, padded):
        model, inputs, capacity = decoder(), prompts(padded), 6
        expected = generated(by_the_oracle(model, name, capacity, window=window, **options), inputs)
        sparse = swapped(model, NONE if window is None else local(window))
        cache = sm.generation_cache(sparse, policy_of(name, capacity, options))
        lengths = []

        def watch(ids, scores):
            lengths.append([layer.lengths for layer in cache.kv])
            return scores

        assert_generates(generated(sparse, inputs, cache=cache, logits_processor=[watch]), expected)
        assert len(lengths) == NEW
        most = PROMPT + NEW if name == "full" else capacity
        assert all((layer <= most).all() for step in lengths for layer in step)
        if name != "full":
            assert not torch.equal(expected.logits[-1], generated(model, inputs).logits[-1])

    @pytest.mark.parametrize("name", ["sliding_window", "score_based"])
    def test_keys_stay_at_their_positions(self, name):
        """Of the first layer, which sees tokens and positions alone."""
        model, inputs = decoder(), prompts(padded=True)
        sparse = swapped(model)
        cache = sm.generation_cache(sparse, CachePolicy(name, capacity=5))
        got = generated(sparse, inputs, cache=cache).sequences[:, :-1]
        real = torch.cat((inputs["attention_mask"], torch.ones(2, NEW - 1, dtype=torch.long)), 1)
        every = transformers.DynamicCache()
        model(got, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0), cache=every)
        entries, padding = cache.kv[0].entries(), (real == 0).sum(1)
        for sample in range(2):
            for head in range(2):
                places = entries.positions[sample, head] + padding[sample]
                expected = every.layers[0].keys[sample, head, places]
                assert_same(entries.keys[sample, head], expected.detach(), atol=1e-12)

    @every_policy
    def test_a_prompt_in_pieces_and_a_second_turn(self, name, options):
        sparse, inputs = swapped(decoder()), prompts(tokens=12)
        policy = policy_of(name, 6, options)
        whole, pieces = (sm.generation_cache(sparse, policy) for _ in range(2))
        expected = generated(sparse, inputs, cache=whole)
        first = {key: value[:, :7] for key, value in inputs.items()}
        with torch.no_grad():
            sparse(**first, cache=pieces)
        assert pieces.get_seq_length() == 7
        assert_generates(generated(sparse, inputs, cache=pieces), expected)
        chunked = sm.generation_cache(sparse, policy)
        got = generated(sparse, inputs, cache=chunked, prefill_chunk_size=5)
        assert_generates(got, expected)

    def test_capacities_by_layer_and_head(self):
        sparse, inputs = swapped(decoder()), prompts()
        capacities = [[4, 9], [12, 5]]
        cache = sm.generation_cache(sparse, CachePolicy("combined", recent=2), capacity=capacities)
        generated(sparse, inputs, cache=cache)
        assert [layer.lengths[0].tolist() for layer in cache.kv] == capacities

    def test_layers_beside_swapped_ones_forget_too(self):
        model, inputs = decoder(), prompts()
        sparse = copy.deepcopy(model)
        sm.sparsify(sparse, NONE, include=r"layers\.0\.self_attn")
        cache = sm.generation_cache(sparse, CachePolicy("sliding_window", 6))
        assert_generates(
            generated(sparse, inputs, cache=cache), generated(by_the_oracle(model, "sliding_window", 6), inputs)
        )

    def test_beams_forget_apart(self):
        model, inputs = swapped(decoder()), prompts()
        cache = sm.generation_cache(model, CachePolicy("score_based", capacity=6))
        model.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=3, cache=cache)
        assert cache.kv[0].lengths.tolist() == [[6, 6]] * 6


class TestLife:
    def test_what_it_says_of_itself(self):
        model, inputs = swapped(decoder()), prompts(padded=True)
        cache = sm.generation_cache(model, CachePolicy("sliding_window", 6))
        assert isinstance(cache, transformers.Cache)
        assert (len(cache), cache.get_seq_length(), cache.get_max_length()) == (2, 0, 6)
        generated(model, inputs, cache=cache)
        # All tokens that came, padding included: the last one generated has not.
        assert cache.get_seq_length() == cache.get_seq_length(1) == PROMPT + NEW - 1
        assert cache.get_mask_sizes(3, 0) == (3, PROMPT + NEW - 1)
        assert cache.get_max_length() == cache.get_max_length(1) == cache.get_max_cache_shape() == 6
        assert not cache.is_compileable
        assert repr(cache).startswith("GenerationCache(KVCache(sliding_window, 2 layers: 48 of 112 entries kept")
        assert sm.generation_cache(model, CachePolicy("full")).get_max_length() == -1
        by_head = sm.generation_cache(model, CachePolicy("sliding_window"), capacity=[[4, 9], [3, 5]])
        assert [by_head.get_max_length(layer) for layer in (None, 0, 1)] == [9, 9, 5]

    def test_reset_makes_it_as_new(self):
        model = swapped(decoder())
        cache = sm.generation_cache(model, CachePolicy("combined", 6, recent=2))
        expected = generated(model, prompts(), cache=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        generated(model, prompts(samples=3), cache=cache)
        cache.reset()
        assert_generates(generated(model, prompts(), cache=cache), expected, atol=0)

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    def test_a_copy_of_a_cached_prompt_goes_on_alone(self, way):
        model, inputs = swapped(decoder()), prompts()
        cache = sm.generation_cache(model, CachePolicy("combined", 6, recent=2))
        expected = generated(model, inputs, cache=copy.deepcopy(cache))
        with torch.no_grad():
            model(inputs["input_ids"][:, :-1], cache=cache)
        for _ in range(2):
            assert_generates(generated(model, inputs, cache=way(cache)), expected)

    def test_samples_are_repeated_and_selected(self):
        model, inputs = swapped(decoder()), prompts()
        cache = sm.generation_cache(model, CachePolicy("combined", 6, recent=2))
        with torch.no_grad():
            model(**inputs, cache=cache)
            keys = cache.kv[1].entries().keys
            cache.batch_repeat_interleave(2)
            assert torch.equal(cache.kv[1].entries().keys, keys.repeat_interleave(2, 0))
            cache.batch_select_indices(torch.tensor([3, 0]))
            assert torch.equal(cache.kv[1].entries().keys, keys.flip(0))


class TestRefused:
    def test_a_model_that_was_not_swapped(self):
        with pytest.raises(ValueError, match=r"model: LlamaForCausalLM has no swapped attention .*sparsify\(model"):
            sm.generation_cache(decoder(), CachePolicy("full"))

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_a_model_that_is_dense_when_it_runs(self, implementation):
        model, inputs = swapped(decoder()), prompts()
        cache = sm.generation_cache(model, CachePolicy("full"))
        sm.densify(model)
        model.set_attn_implementation(implementation)
        with pytest.raises(RuntimeError, match=r"cache: .* for the attention function of sparse_mhsa alone.*sparsify"):
            generated(model, inputs, cache=cache)

    @pytest.mark.parametrize("layers", [1, 3])
    def test_a_cache_of_another_model(self, layers):
        cache = sm.generation_cache(swapped(decoder()), CachePolicy("full"))
        other = swapped(decoder(num_hidden_layers=layers))
        with pytest.raises(ValueError, match=f"cache: it is for 2 layers, .* is one of {layers}; make one for this"):
            generated(other, prompts(), cache=cache)

    def test_another_number_of_samples(self):
        model = swapped(decoder())
        cache = sm.generation_cache(model, CachePolicy("full"))
        generated(model, prompts(), cache=cache)
        with pytest.raises(ValueError, match="cache: it holds 2 samples, and 3 arrive; reset it before other prompts"):
            generated(model, prompts(tokens=30, samples=3), cache=cache)

    def test_a_forward_pass_that_broke_off(self, monkeypatch):
        model = swapped(decoder())
        cache = sm.generation_cache(model, CachePolicy("full"))

        def breaks(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(model.model.layers[1], "forward", breaks)
            with pytest.raises(KeyboardInterrupt):
                model(**prompts(), cache=cache)
        with pytest.raises(RuntimeError, match="an earlier forward pass broke off between two layers; reset it"):
            generated(model, prompts(tokens=20), cache=cache)
        cache.reset()
        generated(model, prompts(), cache=cache)

    @pytest.mark.parametrize(
        "config",
        [
            {"mask": "strided", "mask_kwargs": {"stride": 2}},
            {"mask": "local", "mask_kwargs": {"window": 2, "dilation": 2}},
            {"mask": "local", "mask_kwargs": {"window": 2, "include_self": False}},
            {"mask": "local", "mask_kwargs": {"window": 2}, "num_prefix_tokens": 1},
            {"mask": "topk"},
            {"backend": "flex"},
            {"backend": "efficient"},
        ],
        ids=str,
    )
    def test_masks_that_have_no_meaning_for_a_cache(self, config):
        model = swapped(decoder())
        cache = sm.generation_cache(model, CachePolicy("full"))
        sm.sparsify(model, config, include="self_attn")
        with pytest.raises(ValueError, match=r"mask: a cache can apply `none` and `local` .*; generate with use_cach"):
            sm.generation_cache(model, CachePolicy("full"))
        with pytest.raises(ValueError, match="mask: a cache can apply `none` and `local`"):
            generated(model, prompts(), cache=cache)

    @pytest.mark.parametrize("how", ["a model", "the prompt"])
    def test_assisted_generation_takes_tokens_back(self, how):
        model, inputs = swapped(decoder()), prompts(samples=1)
        options = {"assistant_model": decoder()} if how == "a model" else {"prompt_lookup_num_tokens": 3}
        with pytest.raises(ValueError, match="Assisted decoding requires a cache that can be cropped"):
            model.generate(
                **inputs, max_new_tokens=NEW, cache=sm.generation_cache(model, CachePolicy("full")), **options
            )
        # With transformers' own cache it works, as long as the mask keeps every key.
        expected = decoder().generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options), expected)

    def test_layers_that_see_chunks(self):
        model = swapped(decoder())
        model.config.layer_types = ["full_attention", "chunked_attention"]
        with pytest.raises(ValueError, match="model: LlamaForCausalLM has layers of chunked_attention, which"):
            sm.generation_cache(model, CachePolicy("full"))

    def test_a_model_that_caches_something_else(self, monkeypatch):
        model = swapped(decoder())
        cache = sm.generation_cache(model, CachePolicy("full"))
        update = cache.update
        monkeypatch.setattr(cache, "update", lambda key, value, layer, **_: (update(key, value, layer)[0] * 2, value))
        with pytest.raises(RuntimeError, match=r"mul was called on them: .* something else, such as compressed"):
            generated(model, prompts(), cache=cache)

    def test_layers_that_share_keys_and_values(self, monkeypatch):
        model = swapped(decoder())
        cache = sm.generation_cache(model, CachePolicy("full"))
        update, shared = cache.update, {}

        def once(key, value, layer, **kwargs):
            return shared.setdefault("tokens", update(key, value, layer))

        monkeypatch.setattr(cache, "update", once)
        with pytest.raises(RuntimeError, match="uses the keys and values of another layer, which have joined already"):
            generated(model, prompts(), cache=cache)
        model.config.num_kv_shared_layers = 1
        with pytest.raises(ValueError, match="model: LlamaForCausalLM has layers that share keys and values, which"):
            sm.generation_cache(model, CachePolicy("full"))

    def test_what_the_cache_cannot_give(self):
        model = swapped(decoder())
        cache = sm.generation_cache(model, CachePolicy("full"))
        inputs = prompts()
        for options, error, message in (
            ({"output_attentions": True}, ValueError, "output_attentions: SparseLlamaAttention asks for it"),
            ({"position_bias": torch.zeros(1)}, ValueError, "position_bias: SparseLlamaAttention asks for it"),
        ):
            with torch.no_grad(), pytest.raises(error, match=message):
                model(**inputs, cache=cache, **options)
        with pytest.raises(RuntimeError, match="decoding has no gradient"):
            model(**inputs, cache=cache)
        with pytest.raises(ValueError, match=r"tokens cannot be taken back .*, got crop\(-1\)"):
            cache.crop(-1)
        bidirectional = torch.ones(2, 1, PROMPT, PROMPT, dtype=torch.bool)
        with torch.no_grad(), pytest.raises(ValueError, match="attention_mask: a cache honours causal masks and pad"):
            model(inputs["input_ids"], attention_mask=bidirectional, cache=cache)
        with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask: a cache expects \(B, tokens so far\)"):
            model(inputs["input_ids"], attention_mask=bidirectional[..., :3], cache=cache)
        training = swapped(decoder(attention_dropout=0.5)).train()
        with torch.no_grad(), pytest.raises(ValueError, match="dropout: SparseLlamaAttention asks for it"):
            training(**inputs, cache=sm.generation_cache(training, CachePolicy("full")))
        assert cache.get_seq_length() == 0
