# The demo's base model: a 3-layer byte-level GPT that learns the language of film reviews
# (lab/films.py). The other demo configs train it first where it is missing.
#
#   python train.py config/sft_demo.py
#
# Data: 20,000 reviews drawn from the grammar, no download. Expect a validation loss near 13 nats a
# review (the language's own entropy is 12.3) after one to two minutes on two cores.
from lab import films

out_dir = 'out/sft_demo'
overwrite = True
init_from = dict(n_layer=3, n_head=2, n_embd=96, block_size=128)

dataset = films.texts()
tokenizer = 'byte'
max_length = 112
max_prompt_length = 48
val_fraction = 0.02

loss = 'sft'

batch_size = 32
learning_rate = 5e-3
warmup_iters = 20
max_iters = 800
grad_clip = 0.0

eval_interval = 400
compile = False
