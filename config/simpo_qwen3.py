# SimPO of Qwen3-0.6B on UltraFeedback, by the model's own tokenizer and chat template.
#
#   python train.py config/simpo_qwen3.py
#   python sample.py out/simpo_qwen3 --chat
#
# Data: 61,135 pairs from the hub. Your own: --dataset=pairs.jsonl
#
# Beta, the ratio gamma / beta = 0.55 and the learning rate are those of SimPO's authors for
# Llama-3-8B-Instruct (Meng et al. 2024, arXiv:2405.14734, and their repository); a smaller model
# may want a larger rate. Small random Qwen3s have been trained through this file's settings on a
# CPU; these weights, this data and a GPU were not available to us.

out_dir = 'out/simpo_qwen3'
init_from = 'Qwen/Qwen3-0.6B'

dataset = 'HuggingFaceH4/ultrafeedback_binarized'
max_length = 1024
max_prompt_length = 512
bad_records = 'skip'     # some responses there are blank
val_fraction = 0.01

loss = 'simpo'
beta = 2.5
gamma = 1.375

batch_size = 128
learning_rate = 1e-6
schedule = 'cosine'
warmup_iters = 47
epochs = 1.0

eval_interval = 200
log_interval = 10
