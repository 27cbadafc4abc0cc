# DPO in the built-in world (demo.py): no download, no GPU, the right answer known.
#
#   python train.py config/dpo_demo.py
#
# Data: 6,000 pairs that the base model writes, labelled by Bradley-Terry on the gold reward. The base model is
# config/sft_demo.py's, which is trained first where it is not there yet.
# Expect: about 4 minutes in all on two cores, 1 of them here; accuracy 0.7 to 0.82 (the labels are noisy: the gold
# reward itself agrees with 75% of them), and nine tenths of the gain that the optimum has at the policy's KL.

out_dir = 'out/dpo_demo'
overwrite = True
init_from = 'out/sft_demo'
init_config = 'config/sft_demo.py'

dataset = 'demo'
tokenizer = 'byte'
max_length = 112
max_prompt_length = 48
val_fraction = 0.05

loss = 'dpo'
beta = 1.0      # the gold reward is in units of 1, so the optimum is pi_ref exp(r)

batch_size = 32
learning_rate = 1e-4
warmup_iters = 10
epochs = 1.0
beta2 = 0.99

eval_interval = 60
compile = False
