"""
Text to token ids, and chats to text: tiktoken's encodings, or a model's own tokenizer and
template.

    tokenizer = get_tokenizer('gpt2')        # a name of tiktoken's; or 'byte', built in
    tokenizer = get_tokenizer('my-model')    # a folder with tokenizer.json
    tokenizer.encode('text')                 # (n,) ids
    tokenizer.encode_turns([dict(role='user', content='Hi')])    # ids of a prompt

A chat is written by the model's own template; without one, as \\n\\nHuman: ... \\n\\nAssistant:
... Text inside a message that spells a special token is encoded as text, never as the token. Left
out: training a tokenizer, tools and documents in templates.
"""
import functools
import os
import re
from datetime import datetime

import numpy as np
import tiktoken

from configurator import InputError, first_line, read_json

END = '<|endoftext|>'
ASSISTANT = '\n\nAssistant:'
# A noncharacter, which no text has. `render` puts it inside words of a message that spell a special
# token, so that they are encoded as text; `encode_rendered` drops it afterwards.
MARK = '\ufdd0'


class Tokenizer:
    """Text to ids and back, by tiktoken or by a model's tokenizer.json; and its chat template.

    n_vocab: size of the vocabulary. eot: the token that ends a response. ends: all tokens at which
    sampling stops. bos, begin: the token that opens every text (Llama's <s>) or None, as a list.
    """
    template, bos, begin = None, None, []

    def __init__(self, name, encoding=None):
        self.name, self.encoding = name, encoding
        if encoding is not None:
            self.n_vocab, self.eot = encoding.n_vocab, encoding.eot_token
            self.ends = {self.eot}
            return
        import tokenizers                # slow to load; gpt2 and byte do without it
        try:
            self.hf = tokenizers.Tokenizer.from_file(os.path.join(name, 'tokenizer.json'))
        except Exception as e:           # the library raises plain Exceptions
            raise InputError(f'{name}/tokenizer.json: not a tokenizer ({first_line(e)})')
        self.hf.no_truncation()
        self.hf.no_padding()
        config, generation = (read_json(os.path.join(name, f'{file}.json'), missing={})
                              for file in ('tokenizer_config', 'generation_config'))
        words = {key: word['content'] if isinstance(word, dict) else word
                 for key, word in config.items()
                 if re.fullmatch('(bos|eos|unk|pad)_token', key) and word}
        ends = generation.get('eos_token_id')
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        eos = self.hf.token_to_id(words.get('eos_token', ''))
        if eos is None and not ends:
            raise InputError(f'{name}: tokenizer_config.json has no eos_token')
        self.n_vocab, self.eot = self.hf.get_vocab_size(), ends[0] if eos is None else eos
        self.ends = {self.eot, *ends}
        self.bos = self.hf.token_to_id(words.get('bos_token', ''))
        plain = self.hf.encode('a', add_special_tokens=False).ids
        opened = self.hf.encode('a').ids
        self.begin = opened[:opened.index(plain[0])]    # what it puts before any text
        added = self.hf.get_added_tokens_decoder().items()
        self.special = {t.content: i for i, t in added if t.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_words = re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')
        jinja = os.path.join(name, 'chat_template.jinja')
        source = config.get('chat_template')
        if os.path.exists(jinja):
            with open(jinja, encoding='utf-8') as f:
                source = f.read()
        if source:
            self.template = compile_template(source, name, words)
            chat = [dict(role='user', content='a'), dict(role='assistant', content='b')]
            closing = self.encode_rendered(self.render(chat).rpartition('b')[2]).tolist()
            # sampling also stops at the first special token after an assistant's turn
            self.ends |= set([i for i in closing if i in self.special.values()][:1])

    def encode(self, text):
        """Text -> (n,) ids. What spells a special token, '<|endoftext|>' say, is ordinary text."""
        if self.encoding is not None:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        return np.array(self.hf_encode(text, as_text=True).ids, dtype=np.uint32)

    def hf_encode(self, text, as_text):
        text.encode()                    # raises UnicodeEncodeError, as tiktoken does
        self.hf.encode_special_tokens = as_text
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, ids):
        if self.encoding is not None:
            return self.encoding.decode(list(ids))
        return self.hf.decode(list(ids), skip_special_tokens=False)

    def render(self, messages, opening=False):
        """Messages -> text by the chat template; `opening` adds the start of the answer."""
        def mark(found):
            return found[0][0] + MARK + found[0][1:]
        marked = [m | dict(content=self.special_words.sub(mark, m['content'])) for m in messages]
        try:
            return self.template.render(messages=marked, add_generation_prompt=opening,
                                        tools=None, documents=None)
        except Exception as e:           # the template's raise_exception, or a mistake in it
            raise InputError(f'the chat template of {self.name} fails ({first_line(e)})')

    def encode_turns(self, messages):
        """Messages -> ids, up to where the assistant's answer begins."""
        if self.template is not None:
            return self.encode_rendered(self.render(messages, opening=True))
        ids = self.encode(plain_chat(messages) + ASSISTANT)
        return np.append(self.begin, ids).astype(np.uint32)

    def encode_rendered(self, text):
        """Rendered text -> (n,) ids: special tokens of the template only, not of messages."""
        encoded = self.hf_encode(text, as_text=False)
        ids = np.array(encoded.ids, dtype=np.uint32)
        if MARK in text:
            ids = ids[[text[start:end] != MARK for start, end in encoded.offsets]]
        return ids


def plain_chat(messages):
    """The template of models without one, as in Anthropic's HH."""
    names = dict(user='Human', assistant='Assistant', system='System')
    return ''.join(f'\n\n{names[m["role"]]}: {m["content"]}' for m in messages)


def compile_template(source, name, words):
    """A Jinja chat template, in the sandbox that transformers runs it in."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    if isinstance(source, list):         # several, by name
        source = next((t['template'] for t in source if t['name'] == 'default'), '')
    # {% generation %} marks the answers, for training; it writes nothing
    source = re.sub(r'({%-?\s*)generation(\s*-?%})', r'\1if true\2', source)
    source = re.sub(r'({%-?\s*)endgeneration(\s*-?%})', r'\1endif\2', source)
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])

    def raise_exception(message):
        raise TemplateError(message)
    sandbox.globals |= dict(words, raise_exception=raise_exception,
                            strftime_now=lambda layout: datetime.now().strftime(layout))
    try:
        return sandbox.from_string(source)
    except TemplateError as e:
        raise InputError(f'{name}: the chat template does not parse ({first_line(e)})')


@functools.cache
def get_tokenizer(name):
    """'byte' (256 bytes and the end of text, built in), a name of tiktoken's, or a folder of a
    model's (tokenizer.json, and optionally tokenizer_config.json, chat_template.jinja)."""
    if name == 'byte':
        return Tokenizer(name, tiktoken.Encoding(
            'byte', pat_str=r'[\s\S]{1,400}', special_tokens={END: 256},
            mergeable_ranks={bytes([i]): i for i in range(256)}))
    if os.path.isdir(name):
        return Tokenizer(name)
    if name not in tiktoken.list_encoding_names():
        raise InputError(f'tokenizer: {name!r} is no folder with tokenizer.json, nor byte, '
                         + ', '.join(tiktoken.list_encoding_names()))
    try:
        return Tokenizer(name, tiktoken.get_encoding(name))
    except Exception as e:    # whatever the download raised
        raise InputError(f'tokenizer: {name!r} cannot be downloaded ({first_line(e)}); '
                         'TIKTOKEN_CACHE_DIR may name a folder that has its tables')
