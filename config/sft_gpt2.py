# GPT-2 fine-tuned on the chosen responses of Anthropic's preferences: the reference that
# config/dpo_gpt2.py starts from.
#
#   python train.py config/sft_gpt2.py
#
# Data: as config/dpo_gpt2.py. GPT-2's weights (500 MB) come from the hub; or --init_from=FOLDER.
# Not yet run on a GPU by us, so no duration and no result to compare with.

out_dir = 'out/sft_gpt2'
init_from = 'gpt2'

dataset = 'Anthropic/hh-rlhf'
max_length = 512
max_prompt_length = 256
val_fraction = 0.01

loss = 'sft'

batch_size = 64
learning_rate = 2e-5
schedule = 'cosine'
warmup_iters = 150
grad_clip = 10.0
epochs = 1.0

eval_interval = 500
log_interval = 10
