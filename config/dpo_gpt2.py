# DPO of GPT-2 on Anthropic's helpful and harmless preferences.
#
#   python train.py config/sft_gpt2.py      # first: the reference, GPT-2 fine-tuned on chosen
#   python train.py config/dpo_gpt2.py --init_from=out/sft_gpt2
#
# Data: 160,800 pairs from the hub, some 350 MB. Your own: --dataset=pairs.jsonl
#
# Settings of the paper (Rafailov et al. 2023, arXiv:2305.18290, appendix B): beta 0.1, batches of
# 64 pairs, a learning rate of 1e-6 after 150 steps of linear warm-up. Theirs was RMSprop, ours is
# AdamW; their models had 2.8 billion parameters, so expect to raise the rate for GPT-2's 124
# million. Not yet run on a GPU by us, so no duration and no result to compare with.

out_dir = 'out/dpo_gpt2'
init_from = 'gpt2'

dataset = 'Anthropic/hh-rlhf'
max_length = 512
max_prompt_length = 256
val_fraction = 0.01

loss = 'dpo'
beta = 0.1

batch_size = 64
learning_rate = 1e-6
schedule = 'constant'
warmup_iters = 150
grad_clip = 10.0
epochs = 1.0

eval_interval = 500
log_interval = 10
