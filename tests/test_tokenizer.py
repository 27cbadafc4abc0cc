"""
Tests of tokenizer.py and of chats in prepare.py: ids equal those of transformers' own
apply_chat_template.

    python -m pytest tests/test_tokenizer.py -k llama3

Each family's folder is built here: a small BPE of its kind, its special tokens, and a chat template
of its style, in our words. Left out: real vocabularies but GPT-2's; tools in templates.
"""
import json
from pathlib import Path

import numpy as np
import pytest

import sample
from configurator import InputError
from prepare import encode_record, tokenize, tokenize_chat
from tokenizer import END, get_tokenizer

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers', reason='compares with transformers')

TEXT = ['the cat sat on the mat and the dog said hello', 'system user assistant 1 2 3'] * 9

# a default system turn, marks for training, and, as Qwen3's, thoughts in the last answer alone
CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
    {%- set asked_again = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list %}
    {%- set parts = m.content.split('</think>') %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- generation %}
    {%- if m.role == 'assistant' and not asked_again %}
        {{- '<think>' + parts[:-1] | join | replace('<think>', '') + '</think>\n\n' }}
    {%- endif %}
    {{- parts[-1].lstrip('\n') + '<|im_end|>\n' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """\
{%- set header = '<|start_header_id|>%s<|end_header_id|>\n\n' %}
{{- bos_token }}
{%- for m in messages %}{{- header % m.role + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- header % 'assistant' }}{% endif %}"""
LLAMA2 = """\
{%- set system = messages[0].content if messages[0].role == 'system' %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' }}
        {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first }}
        {{- m.content + ' [/INST]' }}
    {%- else %}{{- ' ' + m.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
MISTRAL = """\
{{- bos_token if tools is none and documents is none }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- raise_exception('no system turns') }}{% endif %}
    {{- '[INST] ' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}
{%- endfor %}"""


def framed(hf, template):
    """As trainers leave it: a frame around every text, a truncation and a padding."""
    words = [(word, hf.token_to_id(word)) for word in template.split() if word != '$A']
    hf.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=words)
    hf.enable_truncation(4)
    hf.enable_padding(length=8)
    return hf


def byte_level(special, template):
    """A BPE of bytes, as GPT-2's, with two added tokens that are not special."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    hf.add_tokens([tokenizers.AddedToken(word) for word in ('<think>', '</think>')])
    return framed(hf, template)


def spaces_as_text(special=(), prepend='first'):
    """A BPE of characters with bytes to fall back on, as SentencePiece makes it: ▁ for a space."""
    tokens = ['<unk>', '<s>', '</s>', *special]
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>', byte_fallback=True))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    hf.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(
        vocab_size=360, special_tokens=tokens + [f'<0x{i:02X}>' for i in range(256)],
        show_progress=False))
    state = json.loads(hf.to_str())      # the bytes are in the vocabulary, but not special
    state['added_tokens'] = [t for t in state['added_tokens'] if t['content'] in tokens]
    hf, d = tokenizers.Tokenizer.from_str(json.dumps(state)), tokenizers.decoders
    hf.decoder = d.Sequence([d.Replace('▁', ' '), d.ByteFallback(), d.Fuse(), d.Strip(' ', 1, 0)])
    return framed(hf, '<s> $A')


IM = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
HEADERS = ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
CLOSED, OPENED = '$A <|endoftext|>', '<|begin_of_text|> $A'
EOS = dict(eos_token=dict(content='<|im_end|>', special=True, __type='AddedToken'))
HEADER = dict(bos_token='<|begin_of_text|>', eos_token='<|eot_id|>')
SENTENCEPIECE = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
FAMILIES = {   # name -> (tokenizer, chat template, tokenizer_config.json)
    'chatml': (lambda: byte_level(IM, CLOSED), CHATML, EOS),
    'llama3': (lambda: byte_level(HEADERS, OPENED), LLAMA3, HEADER),
    'llama2': (spaces_as_text, LLAMA2, SENTENCEPIECE),
    'llama2 as it was': (lambda: spaces_as_text(prepend='always'), LLAMA2, SENTENCEPIECE),
    'mistral': (lambda: spaces_as_text(['[INST]', '[/INST]']), MISTRAL, SENTENCEPIECE),
}


def write_folder(folder, hf, config, generation=None, jinja=None):
    folder.mkdir()
    hf.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    (folder / 'generation_config.json').write_text(json.dumps(generation or {}))
    if jinja is not None:
        (folder / 'chat_template.jinja').write_text(jinja)
    return str(folder)


@pytest.fixture(scope='module')
def families(tmp_path_factory):
    """name -> (our tokenizer, transformers'), from one folder."""
    made, place = {}, tmp_path_factory.mktemp('families')
    for name, (make, template, config) in FAMILIES.items():
        folder = write_folder(place / name, make(), config, jinja=template)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=f'{folder}/tokenizer.json', chat_template=template,
            **{k: v['content'] if isinstance(v, dict) else v for k, v in config.items()})
        made[name] = get_tokenizer(folder), theirs
    return made


def turns(*texts, system=None):
    """The user's turn, the assistant's, the user's, ..."""
    chat = [dict(role=('user', 'assistant')[i % 2], content=t) for i, t in enumerate(texts)]
    return chat if system is None else [dict(role='system', content=system), *chat]


def answer(*texts):
    return turns('', *texts)[1:]         # the assistant's turn, the user's, ...


def as_transformers(theirs, prompt, answer=()):
    return theirs.apply_chat_template([*prompt, *answer], add_generation_prompt=not answer,
                                      return_dict=False)


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
def test_chats_are_encoded_as_transformers_does(name, chat, families):
    prompt, *answers = CHATS[chat]
    if name == 'mistral':
        prompt = [m for m in prompt if m['role'] != 'system']
    answers, (tokenizer, theirs) = [answer(*each) for each in answers], families[name]
    ids, responses, notes = tokenize_chat(prompt, answers, tokenizer, 10**6)
    assert ids.tolist() == as_transformers(theirs, prompt) and notes == []
    assert tokenizer.encode_turns(prompt).tolist() == ids.tolist()      # as it is sampled
    for messages, response in zip(answers, responses):
        assert [*ids, *response] == as_transformers(theirs, prompt, messages)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_message_that_spells_a_special_token_is_text(name, families):
    """The special ids are those of the same chat without the words; all the text comes back."""
    tokenizer, theirs = families[name]
    special = set(tokenizer.special.values())
    spelled = ' '.join(f'{word}a' for word in [*tokenizer.special, '\ue000'])    # as in icon fonts

    def encode(text):
        prompt, last = turns(f'x {text} y', 'b', text), answer(f'{text} z')
        ids, (response,), _ = tokenize_chat(prompt, [last], tokenizer, 10**6)
        return [*ids, *response], theirs.apply_chat_template(prompt + last, tokenize=False)
    (ids, written), (plain, _) = encode(spelled), encode('word')
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    if name == 'llama2 as it was':       # it reads a space after every special token
        written = written.replace('<s>[', '<s> [')
    assert tokenizer.decode(ids) == written
    text = tokenizer.encode(spelled)
    assert tokenizer.decode(text) == spelled and not special & set(text.tolist())


def test_a_template_is_found_where_transformers_looks(tmp_path, families):
    """In its own file first; else in the settings, one or several by name."""
    hf, chat = byte_level(IM, CLOSED), turns('hello')
    named = [dict(name='tool_use', template='tools'), dict(name='default', template=CHATML)]
    for i, (template, jinja) in enumerate([('other', CHATML), (CHATML, None), (named, None)]):
        config = EOS | dict(chat_template=template)
        ours = get_tokenizer(write_folder(tmp_path / f'{i}', hf, config, jinja=jinja))
        assert ours.encode_turns(chat).tolist() == families['chatml'][0].encode_turns(chat).tolist()


def test_a_long_chat_loses_early_turns(families, settings):
    """Never the system turn or the opening; the rest is as transformers encodes it."""
    tokenizer, theirs = families['chatml']
    chat = turns('first ' * 9, 'b', 'second ' * 9, 'd', 'the last', system='You are a cat.')
    answers = [answer('yes'), answer('no')]
    sizes = [len(tokenizer.encode_turns(chat[:1] + chat[i:])) for i in (1, 3, 5)]
    for longest, kept in [(sizes[0], 1), (sizes[0] - 1, 3), (sizes[1], 3), (sizes[1] - 1, 5)]:
        cfg = settings('', max_prompt_length=longest)
        ids, (yes, _), notes = tokenize(chat, answers, tokenizer, cfg)
        rest = chat[:1] + chat[kept:]
        assert ids.tolist() == as_transformers(theirs, rest)
        assert [*ids, *yes] == as_transformers(theirs, rest, answers[0])
        assert len(notes) == (kept > 1)


def test_a_system_turn_that_fills_the_prompt_drops_the_pair(families, settings):
    chat, cfg = turns('a', system='the cat ' * 9), settings('', max_prompt_length=20)
    _, responses, notes = tokenize(chat, [answer('yes')], families['chatml'][0], cfg)
    assert responses is None and notes[0].startswith('dropped: ')


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
        name, families, settings):
    tokenizer, theirs = families[name]
    for prompt in ('cat', 'the cat sat on the mat and sat'):
        ids, responses, _ = tokenize(
            prompt, ['the dog', 'no'], tokenizer, settings('', max_prompt_length=5))
        assert ids[0] == tokenizer.bos == theirs.bos_token_id and len(ids) <= 5
        assert tokenizer.bos not in np.concatenate([ids[1:], *responses])
        assert all(r[-1] == tokenizer.eot == theirs.eos_token_id for r in responses)
    assert sample.encode_prompt('the cat', tokenizer) == theirs('the cat').input_ids


def test_a_chat_without_a_template_is_sampled_as_it_was_prepared(tmp_path, settings):
    tokenizer = get_tokenizer(write_folder(tmp_path / 'm', byte_level(HEADERS, OPENED), HEADER))
    prompt = turns('a', 'b', 'c', system='d')
    ids, _, _ = tokenize(prompt, [answer('yes')], tokenizer, settings(''))
    assert ids[0] == tokenizer.bos and tokenizer.encode_turns(prompt).tolist() == ids.tolist()


def test_sampling_ends_where_the_model_says(tmp_path):
    """eos_token, what generation_config.json lists, the token that closes the template's turn."""
    hf, eos = byte_level(IM, CLOSED), dict(eos_token='<|endoftext|>')    # IM are 0, 1, 2
    for i, (config, listed, jinja, eot, ends) in enumerate([
            (eos, None, None, 0, {0}), (eos, 7, None, 0, {0, 7}), (eos, [7, 9], None, 0, {0, 7, 9}),
            ({}, [9, 7], None, 9, {9, 7}), (eos, [], CHATML, 0, {0, 2})]):
        tokenizer = get_tokenizer(write_folder(
            tmp_path / f'{i}', hf, config, dict(eos_token_id=listed), jinja))
        assert (tokenizer.eot, tokenizer.ends) == (eot, ends)


@pytest.mark.parametrize('file, content, says', [
    ('tokenizer.json', '{"version": "1.0", "trunc', 'JSON'),
    ('tokenizer_config.json', '{"eos_token": ', 'JSON'),
    ('tokenizer_config.json', '{}', 'eos_token'),
    ('chat_template.jinja', '{% for m in messages %}', 'template'),
    ('chat_template.jinja', "{{ raise_exception('not today\n') }}", 'not today'),
    ('chat_template.jinja', CHATML.replace('.lstrip', '.upper().lstrip'), 'assistant'),
    ('chat_template.jinja', CHATML.replace("'<|im_start|>assistant", "'bot"), 'assistant')])
def test_a_bad_folder_is_one_line_that_names_it(file, content, says, tmp_path):
    folder = write_folder(tmp_path / 'm', byte_level(IM, CLOSED), EOS, jinja=CHATML)
    Path(folder, file).write_text(content)
    with pytest.raises(InputError) as caught:
        tokenize_chat(turns('a'), [answer('the cat')], get_tokenizer(folder), 999)
    message = str(caught.value)
    assert says in message and folder in message and '\n' not in message and len(message) < 600


@pytest.mark.parametrize('prompt, says', [
    (turns('a', system='b'), 'no system turns'), ('a\ud800', 'surrogate'),
    (turns('a\ud800'), 'surrogate')])
def test_a_prompt_that_cannot_be_encoded_is_refused(prompt, says, families, settings):
    record = dict(prompt=prompt, chosen='b', rejected='c')
    with pytest.raises(InputError, match=says):
        encode_record(record, families['mistral'][0], settings(''))


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match='gpt5.*byte.*gpt2'):
        get_tokenizer('gpt5')
