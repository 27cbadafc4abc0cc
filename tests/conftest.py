"""
What the tests share: the root on the path, files of records, settings, GPT-2's tables, tiny models.

    python -m pytest                                       # everything, from the root
    python -m pytest tests/test_prepare.py -k chat         # a part

Left out: the tests' own data, which stands where it is asserted on.
"""
import csv
import gzip
import io
import json
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from configurator import InputError      # noqa: E402 - after the root is on the path
from prepare import Data                 # noqa: E402
from tokenizer import get_tokenizer      # noqa: E402

# Tiny models: 2 layers, 4 heads of width 8, 64 positions, the vocabulary of the byte tokenizer.
VOCAB, BLOCK = 257, 64
BYTES = dict(vocab_size=VOCAB, bos_token_id=256, eos_token_id=256)
GPT2 = BYTES | dict(n_positions=BLOCK, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=1e-3)
LLAMA = BYTES | dict(max_position_embeddings=BLOCK, hidden_size=32, intermediate_size=48,
                     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     rms_norm_eps=1e-3)
LLAMA3_SCALING = dict(rope_type='llama3', rope_theta=1000.0, factor=8.0, low_freq_factor=1.0,
                      high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = {   # name -> (transformers' prefix of Config and LMHeadModel or ForCausalLM, settings)
    'gpt2': ('GPT2', GPT2),
    'llama': ('Llama', LLAMA),
    'llama3': ('Llama', LLAMA | dict(rope_parameters=LLAMA3_SCALING, tie_word_embeddings=True)),
    'mistral': ('Mistral', LLAMA | dict(sliding_window=None)),
    'qwen2': ('Qwen2', LLAMA | dict(use_sliding_window=False)),
    'qwen3': ('Qwen3', LLAMA | dict(head_dim=16, use_sliding_window=False,
                                    tie_word_embeddings=True)),
}


def randomise(model, std=0.2, seed=0):
    """Random numbers in every parameter: GPT-2's initial weights attend almost evenly, which would
    hide a wrong mask."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = name.endswith('weight') and ('ln_' in name or 'norm' in name)
            p.copy_(gain + std * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(autouse=True)
def exact_float32():
    """A training run asks for faster, less exact products; each test starts without them."""
    torch.set_float32_matmul_precision('highest')


@pytest.fixture
def write(tmp_path):
    """write('a.jsonl', records) -> path: in the format its name says; or bytes, or text."""
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding='utf-8')
        elif name.endswith('.parquet'):
            import pyarrow                                 # slow to load
            import pyarrow.parquet
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif name.endswith(('.csv', '.tsv')):
            text, delimiter = io.StringIO(), ',' if name.endswith('.csv') else '\t'
            rows = csv.DictWriter(text, list(content[0]), delimiter=delimiter)
            rows.writeheader()
            rows.writerows(content)
            path.write_text(text.getvalue(), encoding='utf-8', newline='')
        elif name.endswith('.json'):
            path.write_text(json.dumps(content), encoding='utf-8')
        else:
            lines = ''.join(json.dumps(record) + '\n' for record in content).encode()
            path.write_bytes(gzip.compress(lines) if name.endswith('.gz') else lines)
        return str(path)
    return write


@pytest.fixture
def settings(tmp_path):
    """settings(dataset, name=value, ...) -> prepare.Data: bytes for tokens, nothing cut."""
    def settings(dataset, **changed):
        return Data(**dict(
            dataset=dataset, tokenizer='byte', max_length=2000, max_prompt_length=1000,
            val_fraction=0.0, data_dir=str(tmp_path / 'data')) | changed)
    return settings


@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's tokenizer; the test is skipped where its tables cannot be downloaded."""
    try:
        return get_tokenizer('gpt2')
    except InputError as e:
        pytest.skip(str(e))


@pytest.fixture
def tiny(tmp_path):
    """tiny('qwen3') -> (folder, model): a random model of FAMILIES, made and saved by transformers.
    Changes to its configuration: tiny('llama', num_hidden_layers=1)."""
    transformers = pytest.importorskip('transformers', reason='compares with transformers')

    def tiny(family='gpt2', folder='theirs', **changed):
        prefix, sizes = FAMILIES[family]
        config = getattr(transformers, prefix + 'Config')(**sizes | changed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
        randomise(model.float()).save_pretrained(tmp_path / folder)
        return str(tmp_path / folder), model
    return tiny
