# The demo's base model: a 3-layer byte-level GPT that learns the language of film reviews (demo.py).
#
#   python train.py config/sft_demo.py
#
# Data: drawn from the grammar, nothing to download.

out_dir = 'out/sft_demo'
overwrite = True

loss = 'sft'
dataset = 'demo'
tokenizer = 'byte'
max_length = 112
max_prompt_length = 48
val_fraction = 0.02

init_from = 'scratch'
n_layer = 3
n_head = 4
n_embd = 96
block_size = 128

batch_size = 64
tokens_per_batch = 8192
learning_rate = 2e-3
warmup_iters = 20
max_iters = 350
beta2 = 0.99
eval_interval = 350
