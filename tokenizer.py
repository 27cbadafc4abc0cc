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

import numpy as np
import tiktoken

from configurator import InputError, first_line

END = '<|endoftext|>'
ASSISTANT = '\n\nAssistant:'
# A noncharacter, which no text has. `render` puts it inside words of a message that spell a special
# token, so that they are encoded as text; `encode_rendered` drops it afterwards.
MARK = '\ufdd0'
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja',
                   'generation_config.json', 'special_tokens_map.json', 'vocab.json', 'merges.txt')


class Tokenizer:
    """Text to ids and back, by tiktoken or by a model's tokenizer.json; and its chat template.

    n_vocab: size of the vocabulary. eot: the token that ends a response. ends: all tokens at which
    sampling stops. bos: the token that opens a text (Llama's <s>), or None. begin: the list of
    tokens put before a text, often empty.
    """

    def __init__(self, name, encoding=None):
        self.name, self.encoding = name, encoding
        self.bos, self.begin, self.has_template = None, [], False
        if encoding is not None:
            self.n_vocab, self.eot = encoding.n_vocab, encoding.eot_token
            self.ends = {self.eot}
            return
        import transformers              # slow to load; gpt2 and byte do without
        ends = None
        try:
            self.theirs = transformers.PreTrainedTokenizerFast.from_pretrained(name)
            if os.path.exists(os.path.join(name, 'generation_config.json')):
                ends = transformers.GenerationConfig.from_pretrained(name).eos_token_id
        except Exception as e:           # each file has its own errors
            raise InputError(f'{name}: no whole tokenizer ({first_line(e)})')
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.n_vocab, self.bos = len(self.theirs), self.theirs.bos_token_id
        self.eot, self.has_template = self.theirs.eos_token_id, bool(self.theirs.chat_template)
        if self.eot is None and not ends:
            raise InputError(f'{name}: tokenizer_config.json has no eos_token')
        self.eot = ends[0] if self.eot is None else self.eot
        self.ends = {self.eot, *ends}
        self.hf = self.theirs.backend_tokenizer
        self.hf.no_truncation()
        self.hf.no_padding()
        plain, opened = (self.hf.encode('a', add_special_tokens=x).ids for x in (False, True))
        self.begin = opened[:opened.index(plain[0])]    # what it puts before any text
        added = self.hf.get_added_tokens_decoder().items()
        self.special = {t.content: i for i, t in added if t.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_words = re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')
        if self.has_template:
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
            return self.theirs.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=opening)
        except Exception as e:           # the template's raise_exception, or a mistake in it
            raise InputError(f'the chat template of {self.name} fails ({first_line(e)})')

    def encode_turns(self, messages):
        """Messages -> ids, up to where the assistant's answer begins."""
        if self.has_template:
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
