"""
Tests of weights.py: models of transformers in and out, runs, the hub, and files that are refused.

    python -m pytest tests/test_weights.py

Six tiny random models, made and saved by transformers, stand for their families. Left out:
published models, which need a network.
"""
import fnmatch
import json
import os
import pickle
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import weights
from conftest import BLOCK, FAMILIES, VOCAB, randomise
from configurator import InputError
from model import GPT, GPTConfig, pack
from weights import load, save, tokenizer_of


def random_tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def same_logits(ours, theirs):
    tokens = random_tokens(3, BLOCK)
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape == (3, BLOCK, VOCAB)
    assert b.std() > 0.3                                   # numbers worth comparing
    assert (a - b).abs().max() < 1e-4


def same_weights(a, b):
    assert a.config == b.config and a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def edit_json(path, **changed):
    with open(path) as f:
        content = json.load(f) | changed
    with open(path, 'w') as f:
        json.dump(content, f)


# --------------------------------------------------------------------------------------------------
# Families


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_and_packed_log_probs_are_those_of_transformers(family, tiny):
    folder, theirs = tiny(family)
    ours = load(folder)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    same_logits(ours, theirs)
    pairs = [(random_tokens(p, seed=p).tolist(),
              [random_tokens(n, seed=n).tolist() for n in (c, r)])
             for p, c, r in ((1, 63, 7), (40, 1, 24), (13, 20, 50))]
    batch = pack(pairs)
    with torch.no_grad():
        logps = batch.sum_by_response(ours.token_logps(batch))                  # (3, 2)
        for i, (prompt, responses) in enumerate(pairs):
            for k, response in enumerate(responses):
                tokens = torch.tensor([*prompt, *response])
                alone = theirs(tokens[None, :-1]).logits[0].log_softmax(-1)     # (t - 1, V)
                expected = alone.gather(1, tokens[1:, None])[len(prompt) - 1:].sum()
                assert abs(logps[i, k] - expected) < 1e-3


@pytest.mark.parametrize('family', FAMILIES)
def test_saved_models_are_the_same_in_transformers_and_come_back_bit_for_bit(
        family, tiny, tmp_path):
    import transformers
    folder, theirs = tiny(family)
    ours = load(folder)
    save(ours, tmp_path / 'ours')
    assert sorted(os.listdir(tmp_path / 'ours')) == ['config.json', 'model.safetensors']
    same_weights(load(str(tmp_path / 'ours')), ours)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'ours', output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(info.values()), info                    # nothing missing, unexpected, misshapen
    same_logits(ours, again)
    again.save_pretrained(tmp_path / 'again')              # and through their hands
    same_weights(load(str(tmp_path / 'again')), ours)


@pytest.mark.parametrize('family, changed, absent', [
    ('gpt2', dict(layer_norm_epsilon=1e-5),
     'n_inner layer_norm_epsilon tie_word_embeddings scale_attn_weights'),
    ('llama', dict(num_key_value_heads=4, rms_norm_eps=1e-6),
     'num_key_value_heads head_dim rms_norm_eps rope_parameters tie_word_embeddings mlp_bias')])
def test_keys_that_a_config_may_lack(family, changed, absent, tiny):
    """As older files do: Llama 1's has neither grouped queries nor a width of heads."""
    folder, theirs = tiny(family, **changed)
    path = os.path.join(folder, 'config.json')
    with open(path) as f:
        config = json.load(f)
    with open(path, 'w') as f:
        json.dump({key: value for key, value in config.items() if key not in absent.split()}, f)
    same_logits(load(folder), theirs)


# --------------------------------------------------------------------------------------------------
# Files


def state_of(theirs):
    """As older versions wrote it: with every layer's causal mask, or its rotary frequencies."""
    state = dict(theirs.state_dict())
    for layer in range(2):
        if theirs.config.model_type == 'gpt2':
            state[f'transformer.h.{layer}.attn.bias'] = torch.ones(1, 1, BLOCK, BLOCK).tril()
            state[f'transformer.h.{layer}.attn.masked_bias'] = torch.tensor(-1e4)
        else:
            state[f'model.layers.{layer}.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    return state


def as_shards(theirs, folder):
    theirs.save_pretrained(folder, max_shard_size='40KB')
    assert len([name for name in os.listdir(folder) if name.startswith('model-')]) > 2


def as_bin(theirs, folder):
    torch.save(state_of(theirs), os.path.join(folder, 'pytorch_model.bin'))


def as_bin_without_prefix(theirs, folder):
    """As gpt2's own file on the hub."""
    state = {name.removeprefix('transformer.'): t for name, t in state_of(theirs).items()}
    torch.save(state, os.path.join(folder, 'pytorch_model.bin'))


def as_shards_of_bin(theirs, folder):
    files, state = ['pytorch_model-1.bin', 'pytorch_model-2.bin'], state_of(theirs)
    weight_map = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        part = {name: t for name, t in state.items() if weight_map[name] == file}
        torch.save(part, os.path.join(folder, file))
    with open(os.path.join(folder, 'pytorch_model.bin.index.json'), 'w') as f:
        json.dump(dict(metadata={}, weight_map=weight_map), f)


@pytest.mark.parametrize('layout', [
    as_shards, as_bin, as_bin_without_prefix, as_shards_of_bin])
@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_layouts_of_files(family, layout, tiny):
    folder, theirs = tiny(family)
    expected = load(folder)
    os.remove(os.path.join(folder, 'model.safetensors'))
    layout(theirs, folder)
    same_weights(load(folder), expected)


def test_bfloat16_files_are_read_as_float32(tiny):
    import transformers
    folder, theirs = tiny('llama')
    exact = load(folder)
    theirs.bfloat16().save_pretrained(folder)
    ours = load(folder)
    same_logits(ours, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='float32'))
    for name, p in ours.named_parameters():
        assert torch.equal(p, exact.get_parameter(name).bfloat16().float())


def test_checkpoints_of_runs(tmp_path):
    """A run's folder means its ckpt.pt; a file is taken as it is; what is loaded is a copy."""
    config = GPTConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=VOCAB, rope_theta=100.0,
                       rope_scaling=(8.0, 1.0, 4.0, 32))
    newest, best = (randomise(GPT(config), seed=seed) for seed in (1, 2))
    for name, model in (('ckpt.pt', newest), ('best.pt', best)):
        torch.save(dict(model=model.state_dict(), model_config=asdict(model.config),
                        config=dict(tokenizer='byte')), tmp_path / name)
    for name, model in (('', newest), ('ckpt.pt', newest), ('best.pt', best)):
        same_weights(load(str(tmp_path / name)), model)
        assert tokenizer_of(str(tmp_path / name)) == 'byte'
    loaded = load(str(tmp_path))
    with torch.no_grad():
        loaded.wte.weight.zero_()
    same_weights(load(str(tmp_path)), newest)
    (tmp_path / 'tokenizer.json').write_text('{}')
    assert tokenizer_of(str(tmp_path / 'best.pt')) == str(tmp_path)


class Scored(GPT):
    """A model of the user's own, with a parameter more."""

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Parameter(torch.full((3,), 0.5))


def test_another_model_class_keeps_what_the_file_lacks(tiny, tmp_path):
    folder, theirs = tiny('gpt2')
    model = load(folder, Scored)
    assert type(model) is Scored and model.score.tolist() == [0.5] * 3
    same_logits(model, theirs)
    torch.nn.init.ones_(model.score)
    torch.save(dict(model=model.state_dict(), model_config=asdict(model.config), config={}),
               tmp_path / 'ckpt.pt')
    same_weights(load(str(tmp_path), Scored), model)
    with pytest.raises(InputError, match='unexpected tensor score'):
        load(str(tmp_path))


def test_tokenizer_of_folders(tiny):
    folder, _ = tiny('gpt2')
    assert tokenizer_of(folder) == 'gpt2'
    folder, _ = tiny('llama')
    with pytest.raises(InputError, match='no tokenizer.json'):
        tokenizer_of(folder)
    with open(os.path.join(folder, 'tokenizer.json'), 'w') as f:
        f.write('{}')
    assert tokenizer_of(folder) == folder


def test_the_command_exports_a_run(tiny, tmp_path):
    import transformers
    model, run, folder = load(tiny('qwen3')[0]), tmp_path / 'run', tmp_path / 'exported'
    run.mkdir()
    torch.save(dict(model=model.state_dict(), model_config=asdict(model.config), step=7,
                    config=dict(tokenizer='byte', out_dir='out/run', init_from='qwen3', loss='dpo',
                                dataset='pairs.jsonl')), run / 'ckpt.pt')
    weights.main([str(run), str(folder)])
    same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(folder))
    assert json.loads((folder / 'config.json').read_text())['eos_token_id'] == 256
    with pytest.raises(InputError, match='^usage: '):
        weights.main([str(run)])


# --------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(folder) serves it under every name, file by file as asked for; -> the names asked for."""
    huggingface_hub = pytest.importorskip('huggingface_hub')
    cache, names = tmp_path / 'cache', []
    cache.mkdir()

    def serve(folder):
        def snapshot_download(name, allow_patterns):
            names.append(name)
            for file in os.listdir(folder):
                if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                    shutil.copy(os.path.join(folder, file), cache)
            return str(cache)
        monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
        return names, cache
    monkeypatch.chdir(tmp_path)
    return serve


@pytest.mark.parametrize('name', ['gpt2', 'someone/their-model'])
@pytest.mark.parametrize('layout', [None, as_shards, as_bin])
def test_hub_names(name, layout, hub, tiny):
    """The files that are asked for suffice, and of two forms of the weights one is downloaded."""
    folder, theirs = tiny('gpt2')
    if layout is not None:
        os.remove(os.path.join(folder, 'model.safetensors'))
        layout(theirs, folder)
    for file in ('flax_model.msgpack', 'tokenizer.json', *['pytorch_model.bin'][layout is as_bin:]):
        with open(os.path.join(folder, file), 'w') as f:
            f.write('{}')
    names, cache = hub(folder)
    same_logits(load(name), theirs)
    assert set(names) == {name} and tokenizer_of(name) == str(cache)
    assert not (cache / 'flax_model.msgpack').exists()
    assert (cache / 'pytorch_model.bin').exists() == (layout is as_bin)


@pytest.mark.parametrize('name', ['gpt2', 'someone/their-model'])
def test_the_hub_does_not_answer(name, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip('huggingface_hub')

    def snapshot_download(*args, **kwargs):
        raise OSError('no network\nand a long story')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as e:
        load(name)
    assert str(e.value).startswith(f'{name}: no such file or folder, and not from the hub')
    assert 'no network' in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['./none', '/none', 'out/demo/none', '.'])
def test_paths_are_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip('huggingface_hub')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *a, **k: pytest.fail('asks'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match='no model there'):
        load(name)


# --------------------------------------------------------------------------------------------------
# Refused: one line that names the file and what is wrong


def refused(name, *says):
    with pytest.raises(InputError) as e:
        load(name)
    assert all(part in str(e.value) for part in (name, *says)), str(e.value)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500


YARN = dict(rope_type='yarn', factor=4.0, rope_theta=10000.0)


@pytest.mark.parametrize('family, changed, says', [
    ('gpt2', dict(model_type='gemma'), "model_type is 'gemma'; known are gpt2, llama"),
    ('gpt2', dict(activation_function='relu'), "activation_function is 'relu'"),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx is True'),
    ('gpt2', dict(tie_word_embeddings=False), 'tie_word_embeddings is False'),
    ('gpt2', dict(n_embd=None), "no 'n_embd'"),
    ('gpt2', dict(n_layer=3), 'no tensor h.2.ln_1.weight'),
    ('gpt2', dict(n_layer=1), 'unexpected tensor h.1.'),
    ('gpt2', dict(n_positions=99), 'wpe.weight gives shape (64, 32), not (99, 32)'),
    ('llama', dict(hidden_act='gelu'), "hidden_act is 'gelu'"),
    ('llama', dict(attention_bias=True), 'attention_bias is True'),
    ('llama', dict(mlp_bias=True), 'mlp_bias is True'),
    ('llama', dict(rope_parameters=YARN), "rope scaling 'yarn'"),
    ('llama', dict(rope_parameters=None, rope_scaling=dict(type='linear', factor=2.0)),
     "rope scaling 'linear'"),
    ('llama', dict(num_key_value_heads=4), 'q_proj.weight gives shape (64, 32), not (96, 32)'),
    ('llama', dict(tie_word_embeddings=True), 'lm_head.weight differs from the embedding'),
    ('llama3', dict(tie_word_embeddings=False), 'no tensor lm_head.weight'),
    ('mistral', dict(sliding_window=4096), 'sliding_window is 4096'),
    ('qwen2', dict(use_sliding_window=True, sliding_window=16), 'sliding_window is 16'),
    ('qwen3', dict(use_sliding_window=True, sliding_window=16), 'sliding_window is 16')])
def test_configs_that_are_refused(family, changed, says, tiny):
    folder, _ = tiny(family)
    edit_json(os.path.join(folder, 'config.json'), **changed)
    refused(folder, says)


@pytest.mark.parametrize('family, change, says', [
    ('gpt2', lambda t: t.pop('transformer.h.1.mlp.c_fc.bias'), 'no tensor h.1.mlp.c_fc.bias'),
    ('gpt2', lambda t: t.update({'score.weight': torch.zeros(2)}), 'unexpected tensor score'),
    ('gpt2', lambda t: t.update({'lm_head.weight': torch.zeros(VOCAB, 32)}), 'lm_head.weight'),
    ('gpt2', lambda t: t.update({'transformer.ln_f.bias': torch.zeros(31)}), '(31,), not (32,)'),
    ('llama', lambda t: t.pop('model.layers.0.self_attn.k_proj.weight'), 'no tensor'),
    ('llama', lambda t: t.update({'model.layers.0.self_attn.k_proj.weight': torch.zeros(16, 31)}),
     'layers.0.self_attn')])
def test_tensors_that_are_refused(family, change, says, tiny):
    folder, _ = tiny(family)
    path = os.path.join(folder, 'model.safetensors')
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    refused(folder, says)


@pytest.mark.parametrize('file, content, says', [
    ('config.json', b'{', 'config.json: not a JSON file'),
    ('config.json', b'[]', 'config.json: not an object but a list'),
    ('config.json', None, 'no model there'),
    ('model.safetensors', None, 'no model.safetensors or pytorch_model.bin'),
    ('model.safetensors', b'', 'model.safetensors: not a whole model file'),
    ('model.safetensors', 0.5, 'model.safetensors: not a whole model file'),    # cut to half
    ('model.safetensors', 0.99, 'model.safetensors: not a whole model file')])
def test_files_that_are_refused(file, content, says, tiny):
    folder, _ = tiny('gpt2')
    path = os.path.join(folder, file)
    with open(path, 'rb') as f:
        before = f.read()
    os.remove(path)
    if content is not None:
        with open(path, 'wb') as f:
            f.write(before[:int(len(before) * content)] if isinstance(content, float) else content)
    refused(folder, says)


def test_a_missing_shard(tiny):
    folder, theirs = tiny('gpt2')
    os.remove(os.path.join(folder, 'model.safetensors'))
    as_shards(theirs, folder)
    os.remove(os.path.join(folder, sorted(os.listdir(folder))[-2]))
    refused(folder, 'not a whole model file')


@pytest.mark.parametrize('content, says', [
    (b'', 'not a whole checkpoint'), (b'PK\x03\x04 and no more', 'not a whole checkpoint'),
    ([1], 'not a checkpoint of train.py'), (dict(model={}), 'not a checkpoint of train.py'),
    (dict(model={}, config={}, model_config=dict(n_layer=1)), 'no tensor wte.weight'),
    (dict(model={}, config={}, model_config=dict(layers=1)), "keyword argument 'layers'")])
def test_checkpoints_that_are_refused(content, says, tmp_path):
    path = tmp_path / 'ckpt.pt'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refused(str(path), says)


class Planted:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize('dump', [torch.save, save_pickle])
@pytest.mark.parametrize('file', ['ckpt.pt', 'pytorch_model.bin'])
def test_no_code_in_a_file_is_run(file, dump, tiny, tmp_path):
    folder, _ = tiny('gpt2')
    os.remove(os.path.join(folder, 'model.safetensors'))
    content = dict(model=Planted(str(tmp_path / 'was run')), model_config={}, config={})
    dump(content, tmp_path / 'theirs' / file)
    refused(folder, f'{file}: not a whole')
    assert not (tmp_path / 'was run').exists()
    pickle.loads(pickle.dumps(content))                    # it would have been
    assert (tmp_path / 'was run').exists()


def test_models_that_transformers_does_not_have_are_not_saved(tmp_path):
    model = GPT(GPTConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=VOCAB, norm='rms'))
    with pytest.raises(InputError, match='transformers has no gpt2 with such settings'):
        save(model, str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_a_disk_that_is_full_leaves_the_old_model(tiny, tmp_path, monkeypatch):
    model = load(tiny('gpt2')[0])
    save(model, str(tmp_path / 'out'))

    def save_file(tensors, path, metadata):
        with open(path, 'wb') as f:
            f.write(b'half')
        raise SafetensorError('Error while serializing: I/O error: No space left on device')
    monkeypatch.setattr(weights, 'save_file', save_file)
    with pytest.raises(InputError, match='could not be written .*No space left'):
        save(randomise(model, seed=1), str(tmp_path / 'out'))
    assert sorted(os.listdir(tmp_path / 'out')) == ['config.json', 'model.safetensors']
    same_weights(load(str(tmp_path / 'out')), load(str(tmp_path / 'theirs')))
