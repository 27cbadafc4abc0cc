"""
Every command in both READMEs runs: shortened by extra options, on small stand-ins for downloads.

    pytest tests/test_readme.py

They run in one process, in the READMEs' order, in a folder of their own: later ones need what
earlier ones made. Left out: `pip install`, `pytest` (.ci/run), `torchrun` (test_processes.py).
"""
import json
import os
import random
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import train
from lab import films, optimum
from model import GPT, GPTConfig
from weights import save

ROOT = Path(__file__).parent.parent
TEXT = ''.join((ROOT / name).read_text(encoding='utf-8') for name in ('README.md', 'lab/README.md'))
LINES = [line.split('  #')[0].strip() for block in re.findall(r'```sh\n(.*?)```', TEXT, re.S)
         for line in block.splitlines() if line.strip()]

# what shortens a command, by what it begins with: the first that fits
FEW = '--max_iters=2 --batch_size=4 '
PAIRS = FEW + '--dataset=pairs.jsonl '
CHATS = PAIRS + '--max_length=200 --max_prompt_length=100 '
SMALL = '--pairs=20 --max_iters=1 --samples=2 '
SHORT = {
    'python train.py config/dpo_gpt2.py --init_from=out': PAIRS + '--overwrite',
    'python train.py config/dpo_gpt2.py --init_from=Qwen': CHATS + '--init_from=qwen --overwrite',
    'python train.py config/dpo_gpt2.py --': PAIRS + '--init_from=out/sft_gpt2 --max_iters=3',
    'python train.py config/sft_gpt2.py': PAIRS + '--init_from=tiny',
    'python train.py config/simpo_gpt2.py': PAIRS + '--init_from=tiny',
    'python train.py config/dpo_smollm2.py': CHATS + '--init_from=llama',
    'python train.py config/': FEW + '--eval_interval=2',
    'python sample.py out/': '--max_new_tokens=90',
    'python -m lab.frontier frontier --only': SMALL,
    'python -m lab.frontier frontier': SMALL + '--seeds=1 --only=orpo',
    'python -m lab.frontier betas': SMALL + '--seeds=1 --only=4',
    'python -m lab.frontier pairs': SMALL + '--seeds=1 --pairs=30 --only=30',
    'python -m lab.frontier rewards': SMALL + '--seeds=1 --only=gold',
    'python -m lab.frontier sft': '--pairs=20 --max_iters=1',
    'python -m lab.imdb': SMALL + '--only=sft',
    'python -m lab.ppo': '--max_iters=1 --responses=8 --batch_size=4',
    'python -m lab.rounds': '--rounds=1 --round_pairs=8 --max_iters=1 --eval_interval=2',
    'python -m lab.bench': '--model=tiny --batch_size=2 --repeats=1 --peers=False --losses=dpo '
                           '--orders=own --max_prompt_length=32 --max_length=64'}
PRINTED = {'config/dpo_demo': 'share of the optimum', 'lab.bench step': '| memory | dpo',
           'lab.imdb': 'right for 100.0% of 40 reviews'}


def test_the_other_commands_are_those_that_ci_and_other_tests_run():
    assert {line for line in LINES if not line.startswith('python ')} == {
        'pip install -r requirements.txt', 'pip install -r requirements-dev.txt', 'pytest',
        'torchrun --nproc_per_node=2 train.py config/dpo_gpt2.py'}
    assert re.search('requirements-dev.txt.*\npytest', (ROOT / '.ci/run').read_text())


def chat_model(folder, model_type, **fields):
    """A tiny random model with a byte-level tokenizer.json and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(['<|im_start|>', '<|im_end|>', '<|endoftext|>'])
    save(GPT(GPTConfig(
        block_size=256, vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_embd=16,
        n_inner=32, n_kv_head=1, norm='rms', norm_eps=1e-6, gated=True, rope_theta=10000.0,
        bias='none', model_type=model_type, **fields)), folder)
    tokenizer.save(f'{folder}/tokenizer.json')
    template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    Path(folder, 'tokenizer_config.json').write_text(json.dumps(dict(
        eos_token='<|endoftext|>', chat_template=template,
        tokenizer_class='PreTrainedTokenizerFast')))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with the configs, tiny models, a few pairs, and a hardly trained base model."""
    patch, rng = pytest.MonkeyPatch(), random.Random(0)
    patch.chdir(tmp_path_factory.mktemp('readme'))
    os.symlink(ROOT / 'config', 'config')
    torch.manual_seed(0)
    save(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)), 'tiny')
    chat_model('llama', 'llama')
    chat_model('qwen', 'qwen3', qk_norm=True, head_dim=16)
    Path('pairs.jsonl').write_text(''.join(json.dumps(
        dict(prompt=f'{i}:', chosen=f' {i} good', rejected=' bad')) + '\n' for i in range(200)))
    Path('prompts.txt').write_text('ann on iron river (war):\nbob on last song (drama):\n')
    os.mkdir('imdb')
    for kind in ('train_pos', 'train_neg', 'train_unsup', 'test_pos', 'test_neg'):
        tones = ('good', 'fine') if 'pos' in kind else ('bad', 'poor')
        texts = (' '.join(f'The film was {rng.choice(tones)}.' for _ in 'abcd') for _ in range(20))
        Path(f'imdb/{kind}.jsonl').write_text(''.join(
            json.dumps(dict(text=text, label=kind.split('_')[1])) + '\n' for text in texts))
    train.train(train.load_config(['config/sft_demo.py', '--max_iters=60', '--eval_interval=60']))
    pairs = [dict(prompt=a['prompt'], chosen=a['chosen'], rejected=b['chosen']) for a, b in zip(
        films.draw_texts(60, seed=1), films.draw_texts(60, seed=2)) if a['chosen'] != b['chosen']]
    measure, locate = optimum.reference_rewards, optimum.place
    patch.setattr(films, 'base_model', lambda: 'out/sft_demo')
    patch.setattr(films, 'draw_pairs', lambda *arguments: pairs)
    patch.setattr(optimum, 'reference_rewards', lambda *of: measure(*of, prompts=2, samples=4))
    patch.setattr(optimum, 'place', lambda *of: locate(*of[:4], samples=4))
    yield
    patch.undo()


@pytest.mark.parametrize('command', [line for line in LINES if line.startswith('python ')])
def test_command(command, place, monkeypatch, capsys, request):
    if any(word in command for word in ('gpt2', 'pairs.jsonl', 'bench')):
        request.getfixturevalue('gpt2')    # skips where GPT-2's tables are not at hand
    extra = next((more for begin, more in SHORT.items() if command.startswith(begin)), '')
    program, *args = shlex.split(f'{command} {extra}')[1:]
    monkeypatch.setattr(sys, 'stdin', open(os.devnull))    # of a chat
    if program == '-m':
        monkeypatch.setattr(sys, 'argv', args)
        runpy.run_module(args[0], run_name='__main__', alter_sys=True)
    else:
        monkeypatch.setattr(sys, 'argv', [program, *args])
        runpy.run_path(str(ROOT / program), run_name='__main__')
    out = capsys.readouterr().out
    assert out.strip() and all(text in out for name, text in PRINTED.items() if name in command)
