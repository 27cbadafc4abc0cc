"""
tokenizer.py and chats in prepare.py: ids equal those of transformers' own apply_chat_template.

    python -m pytest tests/test_tokenizer.py -k llama3

Each family's folder is built here: a small BPE of its kind, its special tokens, and a chat template
of its style, in our words. Left out: real vocabularies but GPT-2's; tools in templates.
"""
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import sample
from configurator import InputError
from prepare import encode_record, parse, read_record, read_source, tokenize, tokenize_chat
from tokenizer import END, Tokenizer, get_tokenizer

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers', reason='compares with transformers')

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get('NANOPREF_DATA', ROOT.parent / 'shared' / 'data'))
TEXT = ['the cat sat on the mat and the dog said hello', 'system user assistant 1 2 3'] * 9

CHATML = """\
{% for m in messages %}
{% if loop.first and m.role != 'system' %}
{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}
{%- endif %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN3 = """\
{%- set at = namespace(question=0) %}
{%- for m in messages if m.role == 'user' %}{% set at.question = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {%- set parts = m.content.split('</think>') %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > at.question %}
        {%- set thought = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}
        {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- (parts[-1].lstrip('\n') if m.role == 'assistant' else m.content) + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
LLAMA2 = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if system else messages) %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns') }}
    {%- elif m.role == 'user' %}
        {{- bos_token + '[INST] ' }}
        {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first }}
        {{- m.content + ' [/INST]' }}
    {%- else %}{{- ' ' + m.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- raise_exception('no system turns') }}{% endif %}
    {{- '[INST] ' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}
{%- endfor %}"""


def byte_level(special, words=(), begin=''):
    """A BPE of bytes, as GPT-2's; `words` are added tokens that are not special."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(special), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    hf.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    if begin:
        hf.post_processor = tokenizers.processors.TemplateProcessing(
            single=f'{begin} $A', special_tokens=[(begin, hf.token_to_id(begin))])
    return hf


def spaces_as_text(special, prepend='first'):
    """A BPE of characters with bytes to fall back on, as SentencePiece makes it: ▁ for a space."""
    tokens = ['<unk>', '<s>', '</s>', *special]
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>', byte_fallback=True))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    hf.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(
        vocab_size=360, special_tokens=tokens + [f'<0x{i:02X}>' for i in range(256)],
        show_progress=False))
    state = json.loads(hf.to_str())      # the bytes are in the vocabulary, but not special
    state['added_tokens'] = [t for t in state['added_tokens'] if t['content'] in tokens]
    hf = tokenizers.Tokenizer.from_str(json.dumps(state))
    d = tokenizers.decoders
    hf.decoder = d.Sequence([d.Replace('▁', ' '), d.ByteFallback(), d.Fuse(), d.Strip(' ', 1, 0)])
    hf.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)])
    return hf


IM = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
HEADERS = ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
SENTENCEPIECE = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
FAMILIES = {   # name -> (tokenizer, chat template, tokenizer_config.json)
    'chatml': (lambda: byte_level(IM), CHATML, dict(eos_token='<|im_end|>')),
    'qwen3': (lambda: byte_level(IM, ['<think>', '</think>']), QWEN3,
              dict(eos_token=dict(content='<|im_end|>', special=True))),
    'llama3': (lambda: byte_level(HEADERS, begin=HEADERS[0]), LLAMA3,
               dict(bos_token='<|begin_of_text|>', eos_token='<|eot_id|>')),
    'llama2': (lambda: spaces_as_text([]), LLAMA2, SENTENCEPIECE),
    'llama2 as it was': (lambda: spaces_as_text([], 'always'), LLAMA2, SENTENCEPIECE),
    'mistral': (lambda: spaces_as_text(['[INST]', '[/INST]']), MISTRAL, SENTENCEPIECE),
}


def write_folder(folder, hf, config=None, generation=None, jinja=None):
    folder.mkdir(exist_ok=True)
    hf.save(str(folder / 'tokenizer.json'))
    files = {'tokenizer_config.json': config, 'generation_config.json': generation}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    if jinja is not None:
        (folder / 'chat_template.jinja').write_text(jinja)
    return str(folder)


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    """family(name) -> (our tokenizer, transformers'), from one folder."""
    made = {}

    def family(name):
        if name not in made:
            make, template, config = FAMILIES[name]
            folder = write_folder(tmp_path_factory.mktemp('family'), make(), config, jinja=template)
            theirs = transformers.PreTrainedTokenizerFast(
                tokenizer_file=os.path.join(folder, 'tokenizer.json'), chat_template=template,
                **{k: v['content'] if isinstance(v, dict) else v for k, v in config.items()})
            made[name] = get_tokenizer(folder), theirs
        return made[name]
    return family


# --------------------------------------------------------------------------------------------------
# Chats


def turns(*texts, system=None):
    """The user's turn, the assistant's, the user's, ..."""
    chat = [dict(role=('user', 'assistant')[i % 2], content=t) for i, t in enumerate(texts)]
    return chat if system is None else [dict(role='system', content=system), *chat]


def answer(*texts):
    """The assistant's turn, the user's, ..."""
    return turns('', *texts)[1:]


def equal(tokenizer, theirs, prompt, *texts):
    """Prompt and answers by prepare.py are what transformers makes of the same messages."""
    answers = [answer(*each) for each in texts]
    ids, responses, notes = tokenize_chat(prompt, answers, tokenizer, 10**6)
    assert notes == []
    assert ids.tolist() == tokenizer.encode_turns(prompt).tolist() == theirs.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=False)
    for messages, response in zip(answers, responses):
        assert [*ids, *response] == theirs.apply_chat_template(prompt + messages, return_dict=False)


CHATS = {
    'one turn': (turns('the cat'), ('the dog',), ('no',)),
    'system': (turns('hello', system='You are a cat.'), ('Hm?',), ('\nthe user',)),
    'several turns': (turns('a', 'b', 'the cat sat', '1 2', '?', system='x'), ('on the',), ('😀',)),
    'answers of several turns': (turns('a'), ('said', 'why', 'so'), ('é',)),
    'space at the edges': (turns(' the\n', 'hello\n', '\n x  y '), ('the cat ',), ('dog\n\n',)),
    'thoughts': (turns('a', '<think>\nold\n</think>\n\nb', 'c'),
                 ('<think>\nhm the cat\n</think>\n\nyes',), ('no',)),
}


@pytest.mark.parametrize('chat', CHATS)
@pytest.mark.parametrize('name', FAMILIES)
def test_a_chat_is_encoded_as_transformers_does(name, chat, family):
    prompt, *answers = CHATS[chat]
    if name == 'mistral':
        prompt = [m for m in prompt if m['role'] != 'system']
    equal(*family(name), prompt, *answers)


def test_thoughts_stay_in_the_last_turn_alone(family):
    qwen3, _ = family('qwen3')
    prompt, *texts = CHATS['thoughts']
    ids, (a, b), _ = tokenize_chat(prompt, [answer(*each) for each in texts], qwen3, 999)
    assert 'old' not in qwen3.decode(ids)
    assert qwen3.decode(a) == '<think>\nhm the cat\n</think>\n\nyes<|im_end|>\n'
    assert qwen3.decode(b) == '<think>\n\n</think>\n\nno<|im_end|>\n'


@pytest.mark.parametrize('name', FAMILIES)
def test_real_chats_are_encoded_as_transformers_does(name, family):
    path, compared = REAL / 'hh_harmless.jsonl.gz', 0
    if not path.exists():
        pytest.skip(f'{path} is absent')
    for _, (_, raw) in zip(range(60), read_source(str(path))):
        prompt, responses, _, notes = read_record(parse(raw))
        texts = re.split(r'\n\n(?:Human|Assistant):', prompt)[1:-1]
        if not notes and all(text.strip() for text in texts):
            equal(*family(name), turns(*map(str.strip, texts)), *[[r.strip()] for r in responses])
            compared += 1
    assert compared > 40


@pytest.mark.parametrize('name', FAMILIES)
def test_a_message_that_spells_a_special_token_is_text(name, family):
    """The special ids are those of the same chat without the words; all the text comes back."""
    tokenizer, theirs = family(name)
    special = set(tokenizer.special.values())
    words = [*tokenizer.special, '\ue000']       # and a private-use character, as in icon fonts
    spelled = ' '.join(f'{word}a' for word in words)

    def encode(text):
        prompt, last = turns(f'x {text} y', 'b', text), answer(f'{text} z')
        ids, (response,), _ = tokenize_chat(prompt, [last], tokenizer, 10**6)
        return [*ids, *response], theirs.apply_chat_template(prompt + last, tokenize=False)
    ids, written = encode(spelled)
    plain, _ = encode('word')
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    if name == 'llama2 as it was':       # it reads a space after every special token
        written = written.replace('<s>[', '<s> [')
    assert tokenizer.decode(ids) == written
    text = tokenizer.encode(spelled)
    assert tokenizer.decode(text) == spelled and not special & set(text.tolist())


def test_a_template_is_found_where_transformers_looks(tmp_path, family):
    """In its own file first; else in the settings, one or several by name."""
    hf, chat = byte_level(IM), turns('hello')
    named = [dict(name='tool_use', template='tools'), dict(name='default', template=CHATML)]
    for i, (template, jinja) in enumerate([('other', CHATML), (CHATML, None), (named, None)]):
        config = dict(eos_token='<|im_end|>', chat_template=template)
        ours = get_tokenizer(write_folder(tmp_path / f'{i}', hf, config, jinja=jinja))
        assert ours.encode_turns(chat).tolist() == family('chatml')[0].encode_turns(chat).tolist()


def test_what_templates_expect_of_transformers(tmp_path):
    """Templates for training mark the assistant's tokens; tools and documents are None."""
    template = """{% if tools is not none or documents is not none %}{{ 'tools' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
    {%- generation -%}
        {{ m.content + '<|im_end|>' }}
    {%- endgeneration -%}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    config = dict(eos_token='<|im_end|>')
    folder = write_folder(tmp_path / 'm', byte_level(IM), config, jinja=template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f'{folder}/tokenizer.json', chat_template=template, **config)
    equal(get_tokenizer(folder), theirs, turns('the cat', 'sat', 'on'), ['the mat'], ['me'])


# --------------------------------------------------------------------------------------------------
# Long chats


def test_a_long_chat_loses_early_turns_never_the_system_turn_or_the_opening(family, settings):
    tokenizer, theirs = family('chatml')
    chat = turns('first ' * 9, 'b', 'second ' * 9, 'd', 'the last', system='You are a cat.')
    sizes = [len(tokenizer.encode_turns(chat[:1] + chat[i:])) for i in (1, 3, 5)]
    answers = [answer('yes'), answer('no')]
    for longest, kept in [(sizes[0], 1), (sizes[0] - 1, 3), (sizes[1], 3), (sizes[1] - 1, 5),
                          (sizes[2], 5)]:
        cfg = settings('', max_prompt_length=longest)
        ids, (yes, no), notes = tokenize(chat, answers, tokenizer, cfg)
        rest = chat[:1] + chat[kept:]
        assert ids.tolist() == theirs.apply_chat_template(
            rest, add_generation_prompt=True, return_dict=False)
        assert [*ids, *yes] == theirs.apply_chat_template(rest + answers[0], return_dict=False)
        assert len(notes) == (kept > 1)


@pytest.mark.parametrize('name, opened, closed', [
    ('chatml', '<|im_start|>system\nA cat.<|im_end|>\n<|im_start|>user\n',
     '<|im_end|>\n<|im_start|>assistant\n'),
    ('llama2', '<s>[INST] <<SYS>>\nA cat.\n<</SYS>>\n\n', ' [/INST]')])
def test_a_long_last_turn_loses_its_start(name, opened, closed, family, settings, monkeypatch):
    """Token by token, whatever a tokenizer makes of a text that begins elsewhere."""
    tokenizer, _ = family(name)
    chat, render, calls = turns('12 é😀 the ' * 9 + 'the end', system='A cat.'), tokenizer.render, []

    def count(*args, **options):
        calls.append(1)
        assert len(calls) < 20, 'it goes round in circles'
        return render(*args, **options)
    monkeypatch.setattr(tokenizer, 'render', count)
    shortest = len(tokenizer.encode_turns(turns('', system='A cat.'))) + 3
    for longest in range(shortest, len(tokenizer.encode_turns(chat))):
        calls.clear()
        cfg = settings('', max_prompt_length=longest)
        ids, responses, notes = tokenize(chat, [answer('yes')], tokenizer, cfg)
        assert longest - 6 <= len(ids) <= longest and len(notes) == 1 and responses is not None
        written = tokenizer.decode(ids)
        content = written.removeprefix(opened).removesuffix(closed)
        assert written == opened + content + closed and chat[1]['content'].endswith(content)


@pytest.mark.parametrize('chat', [turns('a', system='the cat ' * 9), turns(system='the cat ' * 9)])
def test_a_system_turn_that_fills_the_prompt_drops_the_pair(chat, family, settings):
    _, responses, notes = tokenize(
        chat, [answer('yes')], family('chatml')[0], settings('', max_prompt_length=20))
    assert responses is None and notes[0].startswith('dropped: ')


# --------------------------------------------------------------------------------------------------
# Text, the token that begins and the tokens that end


def test_tokenizers_that_are_built_in(gpt2):
    byte = get_tokenizer('byte')
    for tokenizer, n in ((byte, 257), (gpt2, 50257)):
        assert (tokenizer.n_vocab, tokenizer.eot, tokenizer.ends) == (n, n - 1, {n - 1})
        assert tokenizer.begin == [] and tokenizer.decode([n - 1]) == END
        ids = tokenizer.encode(f'a{END}é😀')
        assert n - 1 not in ids and tokenizer.decode(ids) == f'a{END}é😀'
    assert byte.encode('é').tolist() == [0xc3, 0xa9]
    assert gpt2.encode('Hello world').tolist() == [15496, 995]


@pytest.mark.parametrize('name', ['llama3', 'mistral'])
def test_the_token_that_begins_stands_once_before_a_prompt_never_before_a_response(
        name, family, settings):
    tokenizer, theirs = family(name)
    cfg = settings('', max_prompt_length=5)
    for prompt in ('cat', 'the cat sat on the mat and sat'):
        ids, responses, _ = tokenize(prompt, ['the dog', 'no'], tokenizer, cfg)
        assert ids[0] == tokenizer.bos == theirs.bos_token_id and len(ids) <= 5
        assert tokenizer.bos not in np.concatenate([ids[1:], *responses])
        assert all(r[-1] == tokenizer.eot == theirs.eos_token_id for r in responses)
    assert sample.encode_prompt('the cat', tokenizer) == theirs('the cat').input_ids
    ids, _, _ = tokenize_chat(turns('a', 'b', 'c'), [answer('d')], tokenizer, 999)
    assert ids.tolist().count(tokenizer.bos) == 1 and ids[0] == tokenizer.bos


def test_a_chat_without_a_template_is_sampled_as_it_was_prepared(tmp_path, settings):
    hf = byte_level(HEADERS, begin=HEADERS[0])
    config = dict(bos_token=HEADERS[0], eos_token='<|eot_id|>')
    tokenizer = get_tokenizer(write_folder(tmp_path / 'm', hf, config))
    prompt = turns('a', 'b', 'c', system='d')
    ids, _, _ = tokenize(prompt, [answer('yes')], tokenizer, settings(''))
    assert ids[0] == tokenizer.bos and tokenizer.encode_turns(prompt).tolist() == ids.tolist()


def test_ends(tmp_path):
    """eos_token, what generation_config.json lists, the token that closes the template's turn."""
    hf = byte_level(IM)
    text, im_end = hf.token_to_id('<|endoftext|>'), hf.token_to_id('<|im_end|>')
    eos = dict(eos_token='<|endoftext|>')
    for i, (config, listed, jinja, eot, ends) in enumerate([
            (eos, [], None, text, {text}), (eos, None, None, text, {text}),
            (eos, 7, None, text, {text, 7}), (eos, [7, 9], None, text, {text, 7, 9}),
            ({}, [9, 7], None, 9, {9, 7}), (eos, [], CHATML, text, {text, im_end})]):
        tokenizer = get_tokenizer(write_folder(
            tmp_path / f'{i}', hf, config, dict(eos_token_id=listed), jinja))
        assert (tokenizer.eot, tokenizer.ends) == (eot, ends)


def test_settings_in_the_file_that_are_not_of_the_text(tmp_path):
    """Trainers leave a truncation and a padding in tokenizer.json; an end may be added to texts."""
    hf = byte_level(IM)
    hf.enable_truncation(4)
    hf.enable_padding(length=8)
    hf.post_processor = tokenizers.processors.TemplateProcessing(
        single='$A <|endoftext|>', special_tokens=[('<|endoftext|>', 0)])
    tokenizer = get_tokenizer(write_folder(tmp_path / 'm', hf, dict(eos_token='<|endoftext|>')))
    text = 'the cat sat on the mat and the dog said hello'
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.begin == []


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize('file, content, says', [
    ('tokenizer.json', '{"version": "1.0", "trunc', 'tokenizer.json: not a tokenizer'),
    ('tokenizer.json', None, 'tokenizer.json: not a tokenizer'),
    ('tokenizer_config.json', '{"eos_token": ', 'tokenizer_config.json: not a JSON file'),
    ('tokenizer_config.json', '[]', 'tokenizer_config.json: not an object'),
    ('tokenizer_config.json', '{}', 'no eos_token'),
    ('tokenizer_config.json', '{"eos_token": "<|eot_id|>"}', 'no eos_token'),
    ('chat_template.jinja', '{% for m in messages %}', 'the chat template does not parse'),
    ('chat_template.jinja', "{{ raise_exception('not today\n') }}", 'not today'),
    ('chat_template.jinja', '{{ messages[0].text.strip() }}', 'the chat template'),
])
def test_bad_folder(file, content, says, tmp_path):
    config = dict(eos_token='<|im_end|>')
    folder = write_folder(tmp_path / 'm', byte_level(IM), config, jinja=CHATML)
    os.remove(f'{folder}/{file}')
    if content is not None:
        Path(folder, file).write_text(content)
    with pytest.raises(InputError) as caught:
        get_tokenizer(folder)
    message = str(caught.value)
    assert says in message and folder in message and '\n' not in message and len(message) < 600


@pytest.mark.parametrize('template', [
    CHATML.replace('for m in messages', "for m in messages if m.role != 'assistant'"),
    CHATML.replace('m.content', 'm.content | upper'),
    CHATML.replace("{{ '<|im_start|>assistant", "{{ '<|im_start|>bot")])
def test_a_template_that_loses_the_answer(template, tmp_path):
    tokenizer = Tokenizer(write_folder(
        tmp_path / 'm', byte_level(IM), dict(eos_token='<|im_end|>'), jinja=template))
    with pytest.raises(InputError, match="the chat template of .* the assistant's turn"):
        tokenize_chat(turns('a'), [answer('the cat')], tokenizer, 999)


def test_chats_that_a_template_refuses_and_text_that_is_none(family, settings):
    mistral, cfg = family('mistral')[0], settings('')
    with pytest.raises(InputError, match='the chat template of .*no system turns'):
        tokenize(turns('a', system='b'), [answer('c')], mistral, cfg)
    for prompt in ('a\ud800', turns('a\ud800')):
        with pytest.raises(InputError, match='surrogate'):
            encode_record(dict(prompt=prompt, chosen='b', rejected='c'), mistral, cfg)


def test_unknown_names():
    for name in ('gpt5', '', 'owner/model'):
        with pytest.raises(InputError, match=f'tokenizer: {name!r}.*byte.*gpt2'):
            get_tokenizer(name)
