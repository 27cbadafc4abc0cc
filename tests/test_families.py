"""
Every family of models down the whole road: chat records in, train, resume, evaluate; beside
transformers.

    python -m pytest tests/test_families.py -k qwen3

Left out: logits, greedy decoding and saved folders, which test_weights.py and test_sample.py check.
"""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from conftest import FAMILIES
from weights import load_checkpoint

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers', reason='compares with transformers')

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ("{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")
WORDS = 'the a red dog sees one old cat'.split()


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """place(family) -> transformers' model; `theirs` has its files, chats.jsonl and plain.jsonl."""
    def place(family):
        monkeypatch.chdir(tmp_path)
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {c: i for i, c in enumerate(alphabet)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(['<|start|>', '<|end|>', '<|text|>'])
        context = 'n_positions' if family == 'gpt2' else 'max_position_embeddings'
        _, model = tiny(family, **{context: 256, 'vocab_size': 259, 'bos_token_id': None,
                                   'eos_token_id': 258})
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token='<|text|>', pad_token='<|text|>',
            chat_template=TEMPLATE).save_pretrained('theirs')
        rng = random.Random(0)
        chats, plain = [], []
        for i in range(24):
            p, c, r = (' '.join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(3))
            plain.append(dict(prompt=f'{i} {p}', chosen=f' {c}.', rejected=f' {r}?'))
            turns = [dict(role='user', content=f'{i} {p}'), dict(role='assistant', content=c),
                     dict(role='user', content=r)]
            turns = [dict(role='system', content='Be brief.')] * (i % 2) + turns
            answers = (dict(role='assistant', content=text) for text in (c + '.', r + '?'))
            chats.append(dict(zip(('chosen', 'rejected'), ([*turns, a] for a in answers))))
        for name, records in (('chats', chats), ('plain', plain)):
            Path(f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
        return model
    return place


def options(**changed):
    settings = dict(
        init_from='theirs', dataset='chats.jsonl', max_length=256, max_prompt_length=160,
        val_fraction=0.3, batch_size=5, max_iters=6, eval_interval=3, log_interval=1,
        learning_rate=1e-3, device='cpu') | changed
    return [f'--{name}={value}' for name, value in settings.items()]


def run(**changed):
    return train.train(train.load_config(options(**changed)))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('data', ['chats', 'plain'])
def test_eval_file_equals_transformers_on_each_text_alone(place, family, data):
    """By their model, tokenizer and template, from the text of the record."""
    model = place(family)
    run(out_dir='out', dataset=f'{data}.jsonl', eval_only=True, val_fraction=1.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained('theirs')

    def encoded(record, side):
        if data == 'plain':
            prompt, response = (tokenizer(record[key])['input_ids'] for key in ('prompt', side))
            return prompt, response + [tokenizer.eos_token_id]
        whole = tokenizer.apply_chat_template(record[side], return_dict=False)
        prompt = tokenizer.apply_chat_template(record[side][:-1], return_dict=False,
                                               add_generation_prompt=True)
        return prompt, whole[len(prompt):]

    lines, records = read_lines('out/eval.jsonl'), read_lines(f'{data}.jsonl')
    assert [line['id'] for line in lines] == list(range(len(records)))
    for line, record in zip(lines, records):
        for side in ('chosen', 'rejected'):
            prompt, response = encoded(record, side)
            with torch.no_grad():
                logps = model(torch.tensor([prompt + response])).logits[0, :-1].log_softmax(-1)
            expected = logps[len(prompt) - 1:].gather(1, torch.tensor(response)[:, None]).sum()
            assert line[f'{side}_logps'] == pytest.approx(float(expected), abs=1e-2)
            assert line[f'{side}_length'] == len(response)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_killed_run_resumes_exactly_and_a_live_reference_changes_nothing(
        place, family, monkeypatch):
    place(family)
    metrics = run(out_dir='whole')
    assert metrics['eval/loss'] != pytest.approx(0.6931, abs=1e-3)     # it has learnt
    live = run(out_dir='live', reference='live')
    assert live == pytest.approx(metrics, abs=1e-5)

    class Killed(BaseException):
        pass

    def die_at_step_4(step, *rest):
        if step == 4:
            raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, 'check_finite', die_at_step_4)
        run(out_dir='killed')
    assert run(out_dir='killed', resume=True) == metrics
    ours, theirs = (load_checkpoint(f'{name}/ckpt.pt')['model'] for name in ('killed', 'whole'))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize('family', FAMILIES)
def test_simpo_learns(place, family):
    place(family)
    metrics = run(out_dir='simpo', loss='simpo', max_iters=30, eval_interval=30, val_fraction=0.1)
    first = read_lines('simpo/log.jsonl')[1]
    assert metrics['eval/loss'] < first['eval/loss']


@pytest.mark.parametrize('family', ['gpt2', 'qwen3'])
def test_two_processes_equal_one(place, family):
    place(family)
    run(out_dir='one')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    env = dict(os.environ, OMP_WAIT_POLICY='PASSIVE', OMP_NUM_THREADS='1')
    done = subprocess.run([*launcher, ROOT / 'train.py', *options(out_dir='two')], env=env,
                          text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for ours, theirs in zip(read_lines('two/eval.jsonl'), read_lines('one/eval.jsonl'), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
