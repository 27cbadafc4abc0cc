# DPO of SmolLM2-360M-Instruct on UltraFeedback, by the model's own tokenizer and chat template.
#
#   python train.py config/dpo_smollm2.py
#   python sample.py out/dpo_smollm2 --chat
#
# Data: 61,135 pairs from the hub. Your own: --dataset=pairs.jsonl
#
# Beta 0.5, a learning rate of 1e-6, two epochs, a cosine schedule with a tenth of the steps as
# warm-up and the lengths are those of the model's authors (alignment-handbook,
# recipes/smollm2/dpo/config_smol.yaml, for the model before its own DPO). Small random Llamas
# have been trained through this file's settings on a CPU; these weights, this data and a GPU were
# not available to us.

out_dir = 'out/dpo_smollm2'
init_from = 'HuggingFaceTB/SmolLM2-360M-Instruct'

dataset = 'HuggingFaceH4/ultrafeedback_binarized'
max_length = 1024
max_prompt_length = 512
bad_records = 'skip'     # some responses there are blank
val_fraction = 0.01

loss = 'dpo'
beta = 0.5

batch_size = 128
learning_rate = 1e-6
schedule = 'cosine'
warmup_iters = 94
epochs = 2.0

eval_interval = 200
log_interval = 10
