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
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import weights
from conftest import BLOCK, FAMILIES, VOCAB, randomise
from configurator import InputError
from model import GPT, GPTConfig, pack
from sample import generate
from test_model import close, random_pairs, slow_logps
from weights import load, save, tokenizer_of


def same_logits(ours, theirs):
    tokens = torch.randint(VOCAB, (3, BLOCK), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape == (3, BLOCK, VOCAB)
    assert b.std() > 0.3                                   # numbers worth comparing
    assert (a - b).abs().max() < 1e-4


def same_weights(a, b):
    assert a.config == b.config and a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def edit_json(path, **changed):
    """Keys are changed, or gone where None."""
    content = json.loads(Path(path).read_text()) | changed
    kept = {key: value for key, value in content.items() if value is not None}
    Path(path).write_text(json.dumps(kept))


def save_run(path, model, **config):
    torch.save(dict(model=model.state_dict(), model_config=asdict(model.config), config=config),
               path)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_model_is_the_same_as_in_transformers(family, tiny):
    """Its logits, its packed log-probs, and what it writes."""
    folder, theirs = tiny(family)
    ours = load(folder)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in ours.parameters())
    same_logits(ours, theirs)
    pairs = random_pairs(6, block=BLOCK - 12)
    close(ours.token_logps(pack(pairs)), slow_logps(lambda t: theirs(t).logits, pairs), 1e-4)
    prompts = [prompt for prompt, _ in pairs]
    for prompt, response in zip(prompts, generate(ours, prompts, 12, {256}, temperature=0)):
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert [*prompt, *response] == written[0].tolist()


@pytest.mark.parametrize('family', FAMILIES)
def test_a_saved_model_is_the_same_in_transformers_and_comes_back_bit_for_bit(
        family, tiny, tmp_path):
    import transformers
    folder, theirs = tiny(family)
    ours = load(folder)
    save(ours, tmp_path / 'ours')
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
    edit_json(f'{folder}/config.json', **dict.fromkeys(absent.split()))
    same_logits(load(folder), theirs)


# --------------------------------------------------------------------------------------------------
# Files


def as_shards(theirs, folder):
    theirs.save_pretrained(folder, max_shard_size='40KB')


def as_bin(theirs, folder):
    """As gpt2's own file on the hub: no prefix, and buffers that older versions wrote."""
    state = {name.removeprefix('transformer.'): t for name, t in theirs.state_dict().items()}
    if theirs.config.model_type == 'gpt2':
        state |= {'h.0.attn.bias': torch.ones(1, 1, BLOCK, BLOCK).tril(),
                  'h.0.attn.masked_bias': torch.tensor(-1e4)}
    else:
        state['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    torch.save(state, os.path.join(folder, 'pytorch_model.bin'))


def test_bfloat16_files_are_read_as_float32(tiny):
    folder, theirs = tiny('llama')
    exact = load(folder)
    theirs.bfloat16().save_pretrained(folder)
    for name, p in load(folder).named_parameters():
        assert torch.equal(p, exact.get_parameter(name).bfloat16().float())


def test_checkpoints_of_runs(tmp_path):
    """A run's folder means its ckpt.pt; a file is taken as it is; what is loaded is a copy."""
    config = GPTConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=VOCAB, rope_theta=100.0,
                       rope_scaling=(8.0, 1.0, 4.0, 32))
    newest, best = (randomise(GPT(config), seed=seed) for seed in (1, 2))
    save_run(tmp_path / 'ckpt.pt', newest, tokenizer='byte')
    save_run(tmp_path / 'best.pt', best, tokenizer='byte')
    for name, model in (('', newest), ('ckpt.pt', newest), ('best.pt', best)):
        same_weights(load(str(tmp_path / name)), model)
        assert tokenizer_of(str(tmp_path / name)) == 'byte'
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
    save_run(tmp_path / 'ckpt.pt', model)
    same_weights(load(str(tmp_path / 'ckpt.pt'), Scored), model)
    refused(str(tmp_path / 'ckpt.pt'), 'score')


def test_tokenizer_of_folders(tiny):
    folder, _ = tiny('gpt2')
    assert tokenizer_of(folder) == 'gpt2'
    folder, _ = tiny('llama')
    with pytest.raises(InputError, match='tokenizer.json'):
        tokenizer_of(folder)
    Path(folder, 'tokenizer.json').write_text('{}')
    assert tokenizer_of(folder) == folder


def test_the_command_exports_a_run(tiny, tmp_path):
    import transformers
    model, folder = load(tiny('qwen3')[0]), tmp_path / 'exported'
    save_run(tmp_path / 'ckpt.pt', model, tokenizer='byte', out_dir='out/run', init_from='qwen3',
             loss='dpo', dataset='pairs.jsonl')
    weights.main([str(tmp_path), str(folder)])
    same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(folder))
    assert json.loads((folder / 'config.json').read_text())['eos_token_id'] == 256
    assert 'pairs.jsonl' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('family, layout', [
    ('gpt2', as_shards), ('gpt2', as_bin), ('llama', as_bin)])
def test_layouts_of_files(family, layout, tiny):
    folder, theirs = tiny(family)
    expected = load(folder)
    os.remove(f'{folder}/model.safetensors')
    layout(theirs, folder)
    same_weights(load(folder), expected)


def test_a_name_of_the_hub(tiny, tmp_path, monkeypatch):
    """The files that are asked for suffice, and no others are."""
    import huggingface_hub
    folder, theirs = tiny('gpt2')
    os.remove(f'{folder}/model.safetensors')
    as_shards(theirs, folder)
    Path(folder, 'pytorch_model.bin').write_text('too large')
    Path(folder, 'tokenizer.json').write_text('{}')
    (cache := tmp_path / 'cache').mkdir()

    def snapshot_download(name, allow_patterns):
        assert name == 'someone/their-model'
        for file in os.listdir(folder):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                shutil.copy(os.path.join(folder, file), cache)
        return str(cache)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    same_weights(load('someone/their-model'), load(folder))
    assert tokenizer_of('someone/their-model') == str(cache)
    assert not (cache / 'pytorch_model.bin').exists()


@pytest.mark.parametrize('name', ['/none', './none', 'out/demo/none', 'out/none'])
def test_names_that_lead_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    refused(name, 'no such file or folder')


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise OSError('no network\nand a long story')
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    monkeypatch.chdir(tmp_path)
    refused('someone/their-model', 'no network')


# --------------------------------------------------------------------------------------------------
# Refused: one line that names the file and what is wrong


def refused(name, *says):
    with pytest.raises(InputError) as e:
        load(name)
    assert all(part in str(e.value) for part in (name, *says)), str(e.value)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500


def spoil(path, change):
    """A file is removed, overwritten, cut short, or a key or tensor in it is changed."""
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif change == 'cut':
        path.write_bytes(path.read_bytes()[:-99])
    elif path.name == 'config.json':
        edit_json(path, **change)
    elif path.name == 'model.safetensors':
        tensors = {name: t.clone() for name, t in load_file(path).items()} | change
        save_file({name: t for name, t in tensors.items() if t is not None}, path)
    else:
        torch.save(change, path)


@pytest.mark.parametrize('family, file, change, says', [
    ('gpt2', 'config.json', b'{', 'not a valid JSON'),
    ('gpt2', 'config.json', None, 'config.json'),
    ('gpt2', 'config.json', dict(model_type='gemma'), 'gemma'),
    ('gpt2', 'config.json', dict(activation_function='relu'), 'activation_function'),
    ('gpt2', 'config.json', dict(n_layer=3), 'h.2.attn.c_attn.bias'),
    ('gpt2', 'config.json', dict(n_layer=1), 'h.1.'),
    ('gpt2', 'config.json', dict(n_positions=99), 'wpe.weight'),
    ('llama', 'config.json', dict(attention_bias=True), 'attention_bias'),
    ('llama', 'config.json', dict(rope_parameters=dict(rope_type='yarn')), 'yarn'),
    ('llama', 'config.json', dict(rope_parameters=None, rope_scaling=dict(type='linear')),
     'linear'),
    ('llama', 'config.json', dict(tie_word_embeddings=True), 'lm_head.weight'),
    ('mistral', 'config.json', dict(sliding_window=4096), 'sliding_window'),
    ('qwen3', 'config.json', dict(use_sliding_window=True, sliding_window=16), 'sliding_window'),
    ('gpt2', 'model.safetensors', None, 'no file named model.safetensors'),
    ('gpt2', 'model.safetensors', 'cut', 'SafetensorError'),
    ('gpt2', 'model.safetensors', {'transformer.ln_f.bias': None}, 'ln_f.bias'),
    ('gpt2', 'model.safetensors', {'transformer.ln_f.bias': torch.zeros(31)}, 'ln_f.bias'),
    ('gpt2', 'model.safetensors', {'lm_head.weight': torch.zeros(VOCAB, 32)}, 'lm_head.weight'),
    ('llama', 'model.safetensors', {'model.layers.0.self_attn.k_proj.weight': torch.zeros(16, 31)},
     'layers.0.self_attn.k_proj'),
    ('gpt2', 'ckpt.pt', b'PK\x03\x04 and no more', 'checkpoint'),
    ('gpt2', 'ckpt.pt', dict(model={}), 'checkpoint'),
    ('gpt2', 'ckpt.pt', dict(model={}, config={}, model_config=dict(layers=1)), 'layers')])
def test_what_is_damaged_or_not_one_we_compute_is_refused(family, file, change, says, tiny):
    folder, _ = tiny(family)
    spoil(Path(folder, file), change)
    refused(folder, says)


class Planted:
    def __reduce__(self):
        return os.mkdir, ('was run',)        # what it does when it is unpickled without care


@pytest.mark.parametrize('file, says', [
    ('ckpt.pt', 'ckpt.pt'), ('pytorch_model.bin', 'Weights only load failed')])
def test_no_code_in_a_file_is_run(file, says, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = tiny('gpt2')
    os.remove(f'{folder}/model.safetensors')
    content = dict(model=Planted(), model_config={}, config={})
    torch.save(content, f'{folder}/{file}')
    refused(folder, says)
    assert not os.path.exists('was run')
    pickle.loads(pickle.dumps(content))                    # it would have been
    assert os.path.exists('was run')


def test_a_model_that_transformers_does_not_have_is_not_saved(tmp_path):
    model = GPT(GPTConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=VOCAB, norm='rms'))
    with pytest.raises(InputError, match='transformers has no gpt2'):
        save(model, str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_a_disk_that_is_full_leaves_the_old_model(tiny, monkeypatch):
    import transformers
    folder, _ = tiny('gpt2')
    model, files = load(folder), sorted(os.listdir(folder))

    def save_pretrained(self, path):
        os.makedirs(path)
        Path(path, 'model.safetensors').write_bytes(b'half')
        raise SafetensorError('Error while serializing: I/O error: No space left on device')
    monkeypatch.setattr(transformers.GPT2LMHeadModel, 'save_pretrained', save_pretrained)
    with pytest.raises(InputError, match='No space left'):
        save(randomise(load(folder), seed=1), folder)
    assert sorted(os.listdir(folder)) == files
    same_weights(load(folder), model)
