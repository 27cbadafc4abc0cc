"""
Models in and out: the hub, folders of transformers, a run's checkpoint.

    model = load('gpt2')                       # hub, or a local folder with config.json
    model = load('out/dpo_demo')               # a run: its ckpt.pt; out/dpo_demo/best.pt works, too
    python weights.py out/dpo_gpt2 my-model    # any of these -> a folder that transformers loads

Families: gpt2, llama (SmolLM, too), mistral, qwen2, qwen3. Never executes code from model files.
Left out: quantised weights, adapters, sliding windows, rope scaling other than Llama 3's.
"""
import contextlib
import glob
import json
import os
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import InputError, atomic_write, first_line, read_json, run
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja',
                   'generation_config.json', 'special_tokens_map.json', 'vocab.json', 'merges.txt')

# What transformers calls our modules, without 'transformer.' or 'model.' in front. Several names:
# our matrix is theirs stacked. GPT-2's Conv1D keeps a matrix as (in, out), nn.Linear as (out, in).
GPT2_NAMES = dict(
    wte='wte', wpe='wpe', ln_f='ln_f', block='h.{}.', ln_1='ln_1', qkv='attn.c_attn',
    attn_out='attn.c_proj', ln_2='ln_2', up='mlp.c_fc', down='mlp.c_proj')
LLAMA_NAMES = dict(
    wte='embed_tokens', ln_f='norm', lm_head='lm_head', block='layers.{}.', ln_1='input_layernorm',
    qkv='self_attn.q_proj self_attn.k_proj self_attn.v_proj', q_norm='self_attn.q_norm',
    k_norm='self_attn.k_norm', attn_out='self_attn.o_proj', ln_2='post_attention_layernorm',
    up='mlp.gate_proj mlp.up_proj', down='mlp.down_proj')
FAMILIES = {   # model_type -> (its class in transformers, the fields of GPTConfig that are its own)
    'gpt2': ('GPT2LMHeadModel', dict()),
    'llama': ('LlamaForCausalLM', dict(bias='none')),
    'mistral': ('MistralForCausalLM', dict(bias='none')),
    'qwen2': ('Qwen2ForCausalLM', dict(bias='qkv')),
    'qwen3': ('Qwen3ForCausalLM', dict(bias='none', qk_norm=True)),
}
# our field -> key in config.json
GPT2_KEYS = dict(block_size='n_positions', vocab_size='vocab_size', n_layer='n_layer',
                 n_head='n_head', n_embd='n_embd', n_inner='n_inner', norm_eps='layer_norm_epsilon')
LLAMA_KEYS = dict(block_size='max_position_embeddings', vocab_size='vocab_size',
                  n_layer='num_hidden_layers', n_head='num_attention_heads', n_embd='hidden_size',
                  n_kv_head='num_key_value_heads', head_dim='head_dim', n_inner='intermediate_size',
                  norm_eps='rms_norm_eps', tied='tie_word_embeddings')
ROPE_KEYS = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
OPTIONAL = ('n_inner', 'n_kv_head', 'head_dim', 'norm_eps', 'tied')    # config.json may lack these


# --------------------------------------------------------------------------------------------------
# Loading


def find(name):
    """A model's name -> a path: a checkpoint file, a run's ckpt.pt, or a folder with
    config.json."""
    if os.path.isfile(name):
        return name
    for file, path in (('ckpt.pt', os.path.join(name, 'ckpt.pt')), ('config.json', name)):
        if os.path.exists(os.path.join(name, file)):
            return path
    if os.path.isdir(name) or name.count('/') > 1 or name.startswith(('.', '/', '~')):
        raise InputError(f'{name}: no model there (neither config.json nor ckpt.pt)')
    from huggingface_hub import snapshot_download               # slow to load
    try:
        wanted = ['config.json', '*.safetensors', *TOKENIZER_FILES]
        folder = snapshot_download(name, allow_patterns=wanted)
        if not any(file.endswith('.safetensors') for file in os.listdir(folder)):
            folder = snapshot_download(name, allow_patterns=[*wanted, 'pytorch_model*'])
        return folder
    except Exception as e:    # no network, no such name, no permission: they share no class
        raise InputError(f'{name}: no such file or folder, and not from the hub ({first_line(e)})')


def load(name, model_class=GPT):
    """A GPT, float32, on the CPU, from a hub name, a folder with config.json, a run's folder or a
    checkpoint file. A parameter that only `model_class` has keeps its initial value where the
    file lacks it. Raises InputError where a model is missing, damaged or not one we compute."""
    path = find(name)
    if os.path.isdir(path):
        config = read_config(path)
        state = from_transformers(read_tensors(path), config, path)
    else:
        checkpoint = load_checkpoint(path)
        config, state = make_config(checkpoint['model_config'], path), checkpoint['model']
    # on 'meta' a model takes no memory, and no time to initialise
    with torch.device('meta') if model_class is GPT else contextlib.nullcontext():
        model = model_class(config)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as e:                                  # names the tensor and its shapes
        raise InputError(f'{path}: {first_line(e)}')
    if unexpected:
        raise InputError(f'{path}: unexpected tensor {unexpected[0]}')
    with torch.device('meta'):
        needed = set(GPT(config).state_dict()) & set(missing)
    if needed:
        raise InputError(f'{path}: no tensor {min(needed)}')
    return model


def from_transformers(tensors, config, path):
    """Tensors by transformers' names -> by ours, float32."""
    with torch.device('meta'):
        ours = list(GPT(config).state_dict())
    state = {}
    for name in ours:
        theirs, transposed = their_names(name, config)
        for part in theirs:
            if part not in tensors:
                raise InputError(f'{path}: no tensor {part}')
        parts = [tensors.pop(part).to(torch.float32) for part in theirs]
        try:
            state[name] = torch.cat([part.t() if transposed else part for part in parts])  # a copy
        except RuntimeError:
            raise InputError(f'{path}: tensors {", ".join(theirs)} do not fit together')
    head = tensors.pop('lm_head.weight', None)
    if head is not None and not torch.equal(head.float(), state['wte.weight']):
        raise InputError(f'{path}: lm_head.weight differs from the embedding, which is tied to it')
    if tensors:
        raise InputError(f'{path}: unexpected tensor {min(tensors)}')
    return state


def their_names(ours, config):
    """Our parameter's name -> (the names transformers has for its parts; is the matrix
    transposed)"""
    table = GPT2_NAMES if config.model_type == 'gpt2' else LLAMA_NAMES
    *block, part, kind = ours.split('.')
    prefix = table['block'].format(block[1]) if block else ''
    names = [f'{prefix}{name}.{kind}' for name in table.get(part, part).split()]
    return names, table is GPT2_NAMES and part in ('qkv', 'attn_out', 'up', 'down')


def read_config(folder):
    path = os.path.join(folder, 'config.json')
    return config_of(read_json(path), path)


def config_of(theirs, path):
    """config.json of transformers -> GPTConfig. Raises InputError for what we don't compute."""
    family = theirs.get('model_type')
    if family not in list(FAMILIES):
        raise InputError(f'{path}: model_type is {family!r}; known are {", ".join(FAMILIES)}')
    gpt2 = family == 'gpt2'
    fixed = dict(activation_function='gelu_new', scale_attn_weights=True, tie_word_embeddings=True,
                 scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    if not gpt2:
        window = family == 'mistral' or theirs.get('use_sliding_window')
        fixed = dict(hidden_act='silu', attention_bias=False, mlp_bias=False,
                     **(dict(sliding_window=None) if window else {}))
    for key, value in fixed.items():
        if theirs.get(key, value) != value:
            raise InputError(f'{path}: {key} is {theirs[key]!r}; only {value!r} is supported')
    settings = {}
    for ours, key in (GPT2_KEYS if gpt2 else LLAMA_KEYS).items():
        if theirs.get(key) is None and ours not in OPTIONAL:
            raise InputError(f'{path}: no {key!r}')
        if theirs.get(key) is not None:
            settings[ours] = theirs[key]
    if not gpt2:
        rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}
        kind = rope.get('rope_type', rope.get('type', 'default'))
        if kind not in ('default', 'llama3'):
            raise InputError(f'{path}: rope scaling {kind!r}; supported are default and llama3')
        settings = dict(norm='rms', norm_eps=1e-6, gated=True, tied=False) | settings | dict(
            rope_theta=float(rope.get('rope_theta', theirs.get('rope_theta', 10000.0))),
            rope_scaling=tuple(rope[key] for key in ROPE_KEYS) if kind == 'llama3' else ())
    return make_config(dict(settings, **FAMILIES[family][1], model_type=family), path)


def make_config(settings, path):
    try:
        return GPTConfig(**settings)
    except (TypeError, AssertionError) as e:
        raise InputError(f'{path}: {first_line(e)}')


def read_tensors(folder):
    """All tensors of a folder by name, without the model's prefix, from one file or shards."""
    for pattern, read in (('model*.safetensors', load_file), ('pytorch_model*.bin', torch_load)):
        tensors = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern))):
            try:
                tensors |= read(path)
            except Exception as e:    # each format has its own errors for a file that is cut short
                raise InputError(f'{path}: not a whole model file ({first_line(e)})')
        if tensors:
            buffers = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')
            return {name.removeprefix('transformer.').removeprefix('model.'): t
                    for name, t in tensors.items() if not name.endswith(buffers)}
    raise InputError(f'{folder}: no model.safetensors or pytorch_model.bin, whole or in shards')


def torch_load(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def load_checkpoint(path):
    """What train.py saved: model, model_config, config, step, ... Raises InputError where
    damaged."""
    try:
        checkpoint = torch_load(path)
    except Exception as e:    # torch has many errors for bytes that are no checkpoint
        raise InputError(f'{path}: not a whole checkpoint ({first_line(e)})')
    needed = {'model', 'model_config', 'config'}
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= needed:
        raise InputError(f'{path}: not a checkpoint of train.py')
    return checkpoint


def tokenizer_of(name):
    """The tokenizer that a model was trained with, for get_tokenizer: a folder or a name."""
    path = find(name)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if os.path.exists(os.path.join(folder, 'tokenizer.json')):
        return folder
    if not os.path.isdir(path):
        return load_checkpoint(path)['config']['tokenizer']
    if read_config(path).model_type == 'gpt2':
        return 'gpt2'
    raise InputError(f'{path}: no tokenizer.json; --tokenizer=... names another')


# --------------------------------------------------------------------------------------------------
# Saving


def save(model, folder, tokenizer=None):
    """Write config.json and model.safetensors, float32, of the family the model came from. With a
    tokenizer, config.json has its end-of-text token, too."""
    c, tensors = model.config, {}
    widths = [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    for ours, p in model.state_dict().items():
        names, transposed = their_names(ours, c)
        p = (p.t() if transposed else p).detach().to('cpu', torch.float32)
        sizes = widths if 'qkv' in ours else c.n_inner
        parts = p.split(sizes) if len(names) > 1 else [p]
        prefix = 'transformer.' if c.model_type == 'gpt2' else 'model.'
        for name, part in zip(names, parts):
            name = name if name.startswith('lm_head') else prefix + name
            tensors[name] = part.clone().contiguous()
    keys = GPT2_KEYS if c.model_type == 'gpt2' else LLAMA_KEYS
    config = dict(model_type=c.model_type, architectures=[FAMILIES[c.model_type][0]],
                  torch_dtype='float32')
    config |= {key: getattr(c, ours) for ours, key in keys.items()}
    if c.model_type == 'gpt2':
        config |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        scaling = dict(zip(ROPE_KEYS, c.rope_scaling), rope_type='llama3')
        config |= dict(rope_theta=c.rope_theta, rope_scaling=scaling if c.rope_scaling else None,
                       sliding_window=None, hidden_act='silu')
    config |= dict(bos_token_id=None, eos_token_id=None)
    if tokenizer is not None:
        config |= dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eot)
    if config_of(config, folder) != c:                     # a random model of our own making
        raise InputError(f'{folder}: transformers has no {c.model_type} with such settings: {c}')
    os.makedirs(folder, exist_ok=True)
    with atomic_write(os.path.join(folder, 'model.safetensors'), 'wb') as f:
        try:
            save_file(tensors, f.name, metadata={'format': 'pt'})
        except SafetensorError as e:     # a full disk
            raise OSError(first_line(e))
    with atomic_write(os.path.join(folder, 'config.json')) as f:
        json.dump(config, f, indent=2)


def copy_tokenizer(source, folder):
    """Copy the tokenizer's files from one folder to another, so that a model has its own."""
    for name in TOKENIZER_FILES:
        if os.path.exists(path := os.path.join(source, name)):
            shutil.copy(path, os.path.join(folder, name))


def model_card(checkpoint):
    """A README.md for the model of a run: its base, data, settings and last metrics."""
    config = checkpoint['config']
    lines = [f'# {os.path.basename(config["out_dir"])}', '',
             f'{config["init_from"]}, trained with nanoPref: loss {config["loss"]}, data '
             f'{config["dataset"]}, {checkpoint.get("step", 0)} steps.', '',
             '| setting | value |', '|---|---|']
    lines += [f'| {name} | {value} |' for name, value in config.items() if value not in ('', None)]
    if checkpoint.get('metrics'):
        lines += ['', '| metric | value |', '|---|---|']
        lines += [f'| {name} | {value:.4f} |' for name, value in checkpoint['metrics'].items()]
    return '\n'.join(lines) + '\n'


def main(argv):
    if len(argv) != 2:
        raise InputError('usage: python weights.py MODEL FOLDER')
    name, folder = argv
    path, tokenizer = find(name), tokenizer_of(name)
    save(load(name), folder, get_tokenizer(tokenizer))
    if os.path.isdir(tokenizer):
        copy_tokenizer(tokenizer, folder)
    if os.path.isfile(path):
        with atomic_write(os.path.join(folder, 'README.md')) as f:
            f.write(model_card(load_checkpoint(path)))
    print(f'{folder}: transformers.AutoModelForCausalLM.from_pretrained loads it')
    if not os.path.isdir(tokenizer):
        print(f'its tokenizer is {tokenizer!r}, which has no files: none were written')


if __name__ == '__main__':
    run(main, __doc__)
