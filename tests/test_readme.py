"""
Every command in both READMEs runs: shortened by extra options, on small stand-ins for downloads.

    pytest tests/test_readme.py

The commands run in one process, in the READMEs' order, in a folder of their own: later ones need what
earlier ones made. Not run here: `pip install` and `pytest`, which .ci/run calls on a clean checkout,
and `torchrun`, which tests/test_processes.py runs.
"""
import json
import os
import random
import re
import runpy
import shlex
import sys

import pytest
import torch

import train
from lab import films, optimum
from model import GPT, GPTConfig
from weights import save

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = ''
for path in ('README.md', 'lab/README.md'):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        TEXT += f.read()
LINES = [line.split('  #')[0].strip() for block in re.findall(r'```sh\n(.*?)```', TEXT, re.S)
         for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith('python ')]

# what shortens a command, by what it begins with: the first that fits
SHORT = {
    'python train.py config/dpo_gpt2.py --init_from=out/sft_gpt2': '--dataset=pairs.jsonl --max_iters=2 '
                                                                   '--batch_size=4 --overwrite',
    'python train.py config/dpo_gpt2.py --init_from=Qwen': '--init_from=qwen --max_iters=2 --overwrite '
                                                           '--batch_size=4 --max_length=200 '
                                                           '--max_prompt_length=100',
    'python train.py config/dpo_gpt2.py --resume': '--init_from=out/sft_gpt2 --dataset=pairs.jsonl '
                                                   '--max_iters=3 --batch_size=4',
    'python train.py config/dpo_gpt2.py --eval_only': '--init_from=out/sft_gpt2 --dataset=pairs.jsonl',
    'python train.py config/dpo_gpt2.py': '--init_from=tiny --max_iters=2 --batch_size=4',
    'python train.py config/sft_gpt2.py': '--init_from=tiny --dataset=pairs.jsonl --max_iters=2 '
                                          '--batch_size=4',
    'python train.py config/simpo_gpt2.py': '--init_from=tiny --dataset=pairs.jsonl --max_iters=2 '
                                            '--batch_size=4',
    'python train.py config/dpo_smollm2.py': '--init_from=llama --dataset=pairs.jsonl --max_iters=2 '
                                             '--batch_size=4 --max_length=200 --max_prompt_length=100',
    'python train.py config/': '--max_iters=2 --eval_interval=2 --batch_size=4',
    'python sample.py out/sft_demo': '--max_new_tokens=90',
    'python sample.py out/': '--max_new_tokens=4',
    'python -m lab.frontier frontier --only': '--pairs=20 --max_iters=1 --samples=2',
    'python -m lab.frontier frontier': '--pairs=20 --max_iters=1 --samples=2 --seeds=1 --only=orpo',
    'python -m lab.frontier betas': '--pairs=20 --max_iters=1 --samples=2 --seeds=1 --only=4',
    'python -m lab.frontier pairs': '--pairs=30 --max_iters=1 --samples=2 --seeds=1 --only=30',
    'python -m lab.frontier sft': '--pairs=20 --max_iters=1',
    'python -m lab.imdb': '--pairs=20 --max_iters=1 --samples=2 --only=sft',
    'python -m lab.ppo': '--max_iters=1 --responses=8 --batch_size=4',
    'python -m lab.rounds': '--rounds=1 --round_pairs=8 --max_iters=1 --eval_interval=2',
    'python -m lab.bench': '--model=tiny --batch_size=2 --repeats=1 --peers=False --prompts=2 '
                           '--new_tokens=4 --losses=dpo --orders=own --max_prompt_length=32 '
                           '--max_length=64',
}


def test_the_other_commands_are_those_that_ci_and_other_tests_run():
    others = {line for line in LINES if not line.startswith('python ')}
    assert others == {'pip install -r requirements.txt', 'pip install -r requirements-dev.txt', 'pytest',
                      'torchrun --nproc_per_node=2 train.py config/dpo_gpt2.py'}
    with open(os.path.join(ROOT, '.ci', 'run')) as f:
        script = f.read()
    assert 'requirements-dev.txt' in script and '\npytest' in script


def words(rng, n):
    return ' '.join(rng.choices('good bad fine poor film plot'.split(), k=n))


def chat_model(folder, model_type, **fields):
    """A tiny random model with a byte-level tokenizer.json and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    special = ['<|im_start|>', '<|im_end|>', '<|endoftext|>']
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    config = GPTConfig(block_size=256, vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=2,
                       n_embd=16, n_inner=32, n_kv_head=1, norm='rms', norm_eps=1e-6, gated=True,
                       rope_theta=10000.0, bias='none', model_type=model_type, **fields)
    save(GPT(config), folder)
    tokenizer.save(os.path.join(folder, 'tokenizer.json'))
    template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w') as f:
        json.dump(dict(eos_token='<|endoftext|>', chat_template=template,
                       tokenizer_class='PreTrainedTokenizerFast'), f)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with the configs, tiny models, a few pairs, and a base model that is hardly trained."""
    folder, patch, rng = tmp_path_factory.mktemp('readme'), pytest.MonkeyPatch(), random.Random(0)
    os.symlink(os.path.join(ROOT, 'config'), folder / 'config')
    patch.chdir(folder)
    torch.manual_seed(0)
    save(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)), 'tiny')
    chat_model('llama', 'llama')
    chat_model('qwen', 'qwen3', qk_norm=True, head_dim=16)
    with open('pairs.jsonl', 'w') as f:
        for i in range(200):
            pair = dict(prompt=f'{i} {words(rng, 3)}', chosen=' ' + words(rng, 2),
                        rejected=f' {words(rng, 3)}!')
            f.write(json.dumps(pair) + '\n')
    with open('prompts.txt', 'w') as f:
        f.write('ann on iron river (war):\nbob on last song (drama):\n')
    os.mkdir('imdb')
    for kind in ('train_pos', 'train_neg', 'train_unsup', 'test_pos', 'test_neg'):
        with open(f'imdb/{kind}.jsonl', 'w') as f:
            for _ in range(20):
                text = ' '.join(f'The {words(rng, 2)} was {words(rng, 1)}.' for _ in range(4))
                f.write(json.dumps(dict(text=text, label=kind.split('_')[1])) + '\n')
    base = os.path.join(ROOT, 'config/sft_demo.py')
    train.train(train.load_config([base, '--max_iters=60', '--eval_interval=60']))
    patch.setattr(films, 'base_model', lambda: 'out/sft_demo')
    patch.setattr(films, 'draw_pairs', lambda model, n, seed, world: small_pairs())
    patch.setattr(optimum, 'reference_rewards', few_rewards)
    patch.setattr(optimum, 'place', few_samples)
    yield folder
    patch.undo()


REWARDS, PLACE = optimum.reference_rewards, optimum.place


def few_rewards(reference, world, *more):
    return REWARDS(reference, world, prompts=2, samples=4)


def few_samples(policy, reference, rewards, world, *more, **options):
    return PLACE(policy, reference, rewards, world, samples=4)


def small_pairs():
    for a, b in zip(films.draw_texts(60, seed=1), films.draw_texts(60, seed=2)):
        if a['chosen'] != b['chosen']:
            yield dict(prompt=a['prompt'], chosen=a['chosen'], rejected=b['chosen'])


@pytest.mark.parametrize('command', COMMANDS)
def test_command(command, place, monkeypatch, capsys, request):
    if any(word in command for word in ('gpt2', 'pairs.jsonl', 'bench')):
        request.getfixturevalue('gpt2')    # skips where GPT-2's tables are not at hand
    extra = next((more for begin, more in SHORT.items() if command.startswith(begin)), '')
    program, *args = shlex.split(command)[1:]
    if '--chat' in args:
        monkeypatch.setattr('sys.stdin', open(os.devnull))
    if program == '-m':
        module, *args = args
        monkeypatch.setattr(sys, 'argv', [module, *args, *extra.split()])
        runpy.run_module(module, run_name='__main__', alter_sys=True)
    else:
        monkeypatch.setattr(sys, 'argv', [program, *args, *extra.split()])
        runpy.run_path(os.path.join(ROOT, program), run_name='__main__')
    out = capsys.readouterr().out
    assert out.strip()
    if program == 'train.py' and 'config/dpo_demo.py' in command:
        assert 'share of the optimum' in out
