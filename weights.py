"""
Models in and out: a run's checkpoint, or a model of transformers.

    model = load('gpt2')                       # a name on the hub, or a folder of transformers
    model = load('out/dpo_demo')               # a run: its ckpt.pt; out/dpo_demo/best.pt works, too
    python weights.py out/dpo_gpt2 my-model    # any of these -> a folder that transformers loads

Families: gpt2, llama (SmolLM, too), mistral, qwen2, qwen3. The transformers library reads and
writes their files, and never runs code from them. Left out: quantised weights, adapters, sliding
windows, rope scaling other than Llama 3's.
"""
import contextlib
import os
import shutil

import torch

from configurator import InputError, atomic_write, first_line, run
from model import GPT, GPTConfig
from tokenizer import TOKENIZER_FILES, get_tokenizer

# What transformers calls our modules. Several names: our matrix is theirs stacked. GPT-2's Conv1D
# keeps a matrix as (in, out), nn.Linear as (out, in).
GPT2_NAMES = dict(
    wte='transformer.wte', wpe='transformer.wpe', ln_f='transformer.ln_f', lm_head='lm_head',
    block='transformer.h.{}.', ln_1='ln_1', qkv='attn.c_attn', attn_out='attn.c_proj', ln_2='ln_2',
    up='mlp.c_fc', down='mlp.c_proj')
LLAMA_NAMES = dict(
    wte='model.embed_tokens', ln_f='model.norm', lm_head='lm_head', block='model.layers.{}.',
    ln_1='input_layernorm', qkv='self_attn.q_proj self_attn.k_proj self_attn.v_proj',
    q_norm='self_attn.q_norm', k_norm='self_attn.k_norm', attn_out='self_attn.o_proj',
    ln_2='post_attention_layernorm', up='mlp.gate_proj mlp.up_proj', down='mlp.down_proj')
# our field of GPTConfig -> theirs
KEYS = dict(block_size='max_position_embeddings', vocab_size='vocab_size',
            n_layer='num_hidden_layers', n_head='num_attention_heads', n_embd='hidden_size',
            tied='tie_word_embeddings')
GPT2_KEYS = KEYS | dict(n_inner='n_inner', norm_eps='layer_norm_epsilon')
LLAMA_KEYS = KEYS | dict(n_kv_head='num_key_value_heads', head_dim='head_dim',
                         n_inner='intermediate_size', norm_eps='rms_norm_eps')
ROPE_KEYS = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
LLAMA = dict(norm='rms', gated=True, bias='none')
FAMILIES = dict(gpt2={}, llama=LLAMA, mistral=LLAMA, qwen2=LLAMA | dict(bias='qkv'),
                qwen3=LLAMA | dict(qk_norm=True))
# settings that must have this value where they are present
ONLY = dict(activation_function='gelu_new', scale_attn_weights=True, add_cross_attention=False,
            scale_attn_by_inverse_layer_idx=False, hidden_act='silu', attention_bias=False,
            mlp_bias=False, sliding_window=None, partial_rotary_factor=1.0)


# --------------------------------------------------------------------------------------------------
# Loading


def find(name):
    """A model's name -> a path: a checkpoint file, a run's ckpt.pt, or a folder of transformers."""
    checkpoint = os.path.join(name, 'ckpt.pt')
    if os.path.exists(checkpoint):
        return checkpoint
    if os.path.exists(name):
        return name
    from huggingface_hub import snapshot_download          # slow to load
    try:
        wanted = ['config.json', 'model*.safetensors*', *TOKENIZER_FILES]
        return snapshot_download(name, allow_patterns=wanted)
    except Exception as e:    # no network, no such name, no permission: they share no class
        raise InputError(f'{name}: no such file or folder, and not from the hub ({first_line(e)})')


def load(name, model_class=GPT):
    """A GPT, float32, on the CPU, from a hub name, a folder of transformers, a run's folder or a
    checkpoint file. A parameter that only `model_class` has keeps its initial value where the
    file lacks it. Raises InputError where a model is missing, damaged or not one we compute."""
    path = find(name)
    if os.path.isdir(path):
        config, state = from_transformers(path)
    else:
        checkpoint = load_checkpoint(path)
        config, state = make_config(checkpoint['model_config'], path), checkpoint['model']
    # on 'meta' a model takes no memory, and no time to initialise
    with torch.device('meta') if model_class is GPT else contextlib.nullcontext():
        model = model_class(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    wrong = unexpected + missing * (model_class is GPT)
    if wrong:
        raise InputError(f'{path}: not the tensors of a {model_class.__name__}: {wrong[0]}')
    return model


def load_checkpoint(path):
    """What train.py saved: model, model_config, config, step, ... Raises InputError where
    damaged."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        assert checkpoint.keys() >= {'model', 'model_config', 'config'}, 'not of train.py'
        return checkpoint
    except Exception as e:    # torch has many errors for bytes that are no checkpoint
        raise InputError(f'{path}: not a whole checkpoint ({first_line(e)})')


def read_config(folder):
    """The configuration in a folder of transformers -> GPTConfig."""
    from transformers import AutoConfig, logging           # slow to load
    logging.set_verbosity_error()        # instead of its warnings, our errors
    try:
        return config_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as e:    # InputError; or whatever is wrong with the file
        raise InputError(f'{folder}: {e if isinstance(e, InputError) else first_line(e)}')


def from_transformers(folder):
    """A folder -> (GPTConfig, the state_dict of GPT, float32)."""
    from transformers import AutoModelForCausalLM          # slow to load
    config = read_config(folder)
    try:
        theirs, problems = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as e:    # each format has its own errors for a damaged file
        raise InputError(f'{folder}: {first_line(e)}')
    for problem, tensors in problems.items():
        # old GPT-2 files also store masked_bias, a constant that is not a weight
        if tensors := [str(name) for name in tensors if 'masked_bias' not in name]:
            raise InputError(f'{folder}: {problem.replace("_", " ")}: {min(tensors)}')
    head, embedding = theirs.get_output_embeddings(), theirs.get_input_embeddings()
    if config.tied and head.weight is not embedding.weight:
        raise InputError(f'{folder}: lm_head.weight differs from the embedding it is tied to')
    tensors, state = theirs.state_dict(), {}
    del theirs, head, embedding          # a tensor is freed as soon as ours is made of it
    with torch.device('meta'):
        ours = list(GPT(config).state_dict())
    for name in ours:
        names, transposed = their_names(name, config)
        parts = [tensors.pop(part) for part in names]
        state[name] = torch.cat([part.t() if transposed else part for part in parts])
    return config, state


def their_names(ours, config):
    """Our parameter's name -> (the names transformers has for its parts; is the matrix
    transposed)"""
    table = GPT2_NAMES if config.model_type == 'gpt2' else LLAMA_NAMES
    *block, part, kind = ours.split('.')
    prefix = table['block'].format(block[1]) if block else ''
    names = [f'{prefix}{name}.{kind}' for name in table[part].split()]
    return names, table is GPT2_NAMES and part in ('qkv', 'attn_out', 'up', 'down')


def config_of(theirs):
    """A configuration of transformers -> GPTConfig. Raises InputError for what we don't compute."""
    family = theirs.model_type
    if family not in FAMILIES:
        raise InputError(f'model_type is {family!r}; known are {", ".join(FAMILIES)}')
    for key, value in ONLY.items():
        if getattr(theirs, key, value) != value:
            raise InputError(f'{key} is {getattr(theirs, key)!r}; only {value!r} is supported')
    keys = GPT2_KEYS if family == 'gpt2' else LLAMA_KEYS
    settings = {ours: getattr(theirs, key, None) for ours, key in keys.items()}
    settings = {ours: value for ours, value in settings.items() if value is not None}
    rope = getattr(theirs, 'rope_parameters', None)
    if rope:
        if rope['rope_type'] not in ('default', 'llama3'):
            raise InputError(f'rope scaling {rope["rope_type"]!r} is not default or llama3')
        settings['rope_theta'] = float(rope['rope_theta'])
        if rope['rope_type'] == 'llama3':
            settings['rope_scaling'] = tuple(rope[key] for key in ROPE_KEYS)
    return GPTConfig(**settings, **FAMILIES[family], model_type=family)


def make_config(settings, where):
    """Fields of GPTConfig, from a checkpoint or the user -> GPTConfig."""
    try:
        return GPTConfig(**settings)
    except (TypeError, AssertionError) as e:
        raise InputError(f'{where}: {first_line(e)}')


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
    """Write a folder of transformers, float32, of the family the model came from. With a tokenizer,
    its end-of-text token is in config.json."""
    import transformers                  # slow to load
    c, tensors = model.config, {}
    keys = GPT2_KEYS if c.model_type == 'gpt2' else LLAMA_KEYS
    settings = {theirs: getattr(c, ours) for ours, theirs in keys.items()}
    if c.model_type != 'gpt2':
        settings['rope_parameters'] = dict(rope_theta=c.rope_theta, rope_type='default')
        if c.rope_scaling:
            settings['rope_parameters'] |= dict(zip(ROPE_KEYS, c.rope_scaling), rope_type='llama3')
        settings['sliding_window'] = None
    config = transformers.AutoConfig.for_model(
        c.model_type, **settings, dtype=torch.float32,
        bos_token_id=tokenizer and tokenizer.bos, eos_token_id=tokenizer and tokenizer.eot)
    if config_of(config) != c:           # a random model of our own making
        raise InputError(f'{folder}: transformers has no {c.model_type} with such settings: {c}')
    widths = [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    for ours, p in model.state_dict().items():
        names, transposed = their_names(ours, c)
        p = (p.t() if transposed else p).detach().to('cpu', torch.float32).clone()
        parts = p.split(widths if 'qkv' in ours else c.n_inner) if len(names) > 1 else [p]
        tensors |= {name: part.contiguous() for name, part in zip(names, parts)}
    with torch.device('meta'):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(tensors, strict=False, assign=True)
    theirs.tie_weights()
    os.makedirs(folder, exist_ok=True)
    part = os.path.join(folder, f'{os.getpid()}.tmp')
    try:
        theirs.save_pretrained(part)
        for name in os.listdir(part):
            os.replace(os.path.join(part, name), os.path.join(folder, name))
    except Exception as e:               # a full disk, for which safetensors has its own error
        raise InputError(f'{folder}: could not be written ({first_line(e)})')
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_tokenizer(source, folder):
    """Copy the tokenizer's files from one folder to another, so that a model has its own."""
    for name in TOKENIZER_FILES:
        if os.path.exists(path := os.path.join(source, name)):
            shutil.copy(path, os.path.join(folder, name))


def model_card(checkpoint):
    """A README.md for the model of a run: its base, data, settings and last metrics."""
    config, metrics = checkpoint['config'], checkpoint.get('metrics', {})
    lines = [f'# {os.path.basename(config["out_dir"])}', '',
             f'{config["init_from"]}, trained with nanoPref for {checkpoint.get("step", 0)} steps.',
             '', '| setting or metric | value |', '|---|---|']
    lines += [f'| {name} | {value} |' for name, value in config.items() if value not in ('', None)]
    lines += [f'| {name} | {value:.4f} |' for name, value in metrics.items()]
    return '\n'.join(lines) + '\n'


def main(argv):
    if len(argv) != 2:
        raise InputError('usage: python weights.py MODEL FOLDER')
    name, folder = argv
    path, tokenizer = find(name), tokenizer_of(name)
    save(load(name), folder, get_tokenizer(tokenizer))
    copy_tokenizer(tokenizer, folder)
    if os.path.isfile(path):
        with atomic_write(os.path.join(folder, 'README.md')) as f:
            f.write(model_card(load_checkpoint(path)))
    print(f'{folder}: transformers.AutoModelForCausalLM.from_pretrained loads it')
    if not os.path.isdir(tokenizer):
        print(f'its tokenizer is {tokenizer!r}, which has no files: none were written')


if __name__ == '__main__':
    run(main, __doc__)
