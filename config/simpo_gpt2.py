# SimPO of GPT-2 on UltraFeedback: no reference, so no second model and no pass before training.
#
#   python train.py config/simpo_gpt2.py
#
# Data: 61,135 pairs from the hub (long responses). Your own: --dataset=pairs.jsonl
#
# Settings of the paper (Meng et al. 2024, arXiv:2405.14734): beta 2.0 to 2.5, gamma 0.3 to 1.6,
# batches of 128 pairs, a cosine schedule with a tenth of the steps as warm-up, one epoch. They
# searched learning rates of 3e-7 to 1e-6 for models of 7 and 8 billion parameters; expect to raise
# the rate for GPT-2. Not yet run on a GPU by us, so no duration and no result to compare with.

out_dir = 'out/simpo_gpt2'
init_from = 'gpt2'

dataset = 'HuggingFaceH4/ultrafeedback_binarized'
max_length = 1024
max_prompt_length = 512
bad_records = 'skip'     # some responses there are blank
val_fraction = 0.01

loss = 'simpo'
beta = 2.0
gamma = 1.0

batch_size = 128
learning_rate = 1e-6
schedule = 'cosine'
warmup_iters = 48
grad_clip = 1.0
epochs = 1.0

eval_interval = 200
log_interval = 10
