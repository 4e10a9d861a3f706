"""What stands under the help text of each command."""

EXAMPLES = {
    "datencoder": """\
  datencoder personalize examples/robot.png --out out/robot
  datencoder generate --concept out/robot/concept.safetensors --prompt "a photo of a S* in the snow" --out out/snow
  datencoder COMMAND --help""",
    "personalize": """\
  datencoder personalize examples/robot.png --out out/robot
  datencoder personalize robot.png --prompt "a photo of a S* on the beach" "a pencil sketch of a S*" --out out/robot

  datencoder personalize cat.jpg --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --method lora --word "sks cat" --memory 16 --export --out out/cat
  datencoder personalize pair.jpg --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --method disendiff --token "C* D*" --word "cat dog" --prompt "a C* asleep" "a photo of a D*" --out out/pair

The methods, what each learns, and its steps:
  datencoder         an encoder's prediction, tuned: word embedding and low-rank weight offsets     12
  lora               low-rank weight offsets of attention; the words stay                          200
  textual_inversion  the word embedding alone                                                     1000
  dreambooth         all weights of attention; the words stay                                      300
  custom_diffusion   keys and values of cross-attention, and a word before the class word          250
  e4t                an encoder of one domain and shared offsets, asked again at every step         15
  perfusion          values of cross-attention where the concept stands, behind a gate             400
  infusion           residuals of values where the concept stands                                  500
  para               directions to take out of the weights of attention; the words stay            300
  disendiff          several concepts of one picture, kept apart by their attention                250
datencoder and e4t need an encoder (--encoder); toyworld has one for datencoder.

It writes to the output folder:
  concept.safetensors   the concept, for `datencoder generate` and `datencoder export`
  input.png             the picture as the model saw it
  01_..._0.png, ...     the pictures, by prompt and number
  samples.png           all of it on one sheet
  report.json           nearest words, loss per step, seconds, peak memory, versions, seed""",
    "generate": """\
  datencoder generate --concept out/robot/concept.safetensors --prompt "a photo of a S* in the city" --out out/city
  datencoder generate --prompt "a photo of a red car on the beach" --num 8 --out out/car
  datencoder generate --prompt "a robot at night" --sampler dpm++2m --sampling-steps 12 --out out/night
  datencoder generate --concept cat.safetensors 0.8 --concept hat.safetensors --lora ink.safetensors 0.5 \\
      --prompt "an ink drawing of a C* with a H*" --out out/both""",
    "export": """\
  datencoder export out/cat/concept.safetensors --name my-cat --out out/cat/export
  datencoder export out/cat/concept.safetensors --to kohya --out ComfyUI/models/loras
  datencoder export out/cat/concept.safetensors --to embedding --out ComfyUI/models/embeddings

It writes, by the values of --to:
  diffusers   pytorch_lora_weights.safetensors, learned_embeds.safetensors, concept.safetensors, pipeline.py
  kohya       NAME.safetensors, a LoRA for ComfyUI, Forge and A1111
  embedding   NAME_emb.safetensors, token vectors for the same
  card        README.md and samples.png, a model card""",
    "evaluate": """\
  datencoder evaluate --suite toyworld --methods base,datencoder,lora --steps 0,12 --instances 6 --out out/table
  datencoder evaluate --suite toyworld --methods datencoder@0+12 lora,textual_inversion@12+300 \\
      --sweep 12 --jobs 2 --out out/table
  datencoder evaluate --suite toyworld --methods datencoder,datencoder:start=word,datencoder:offsets=off --out out/parts
  datencoder evaluate --suite dreambench --data dreambooth/dataset --methods lora@300 \\
      --model stable-diffusion-v1-5/stable-diffusion-v1-5 --clip openai/clip-vit-large-patch14 \\
      --dino dino_deitsmall16_pretrain.safetensors --out out/dreambench
  datencoder evaluate --suite toyworld --methods dreambooth@300 --join elsewhere/metrics.json --out out/table

The same command again goes on where the last one stopped; with further methods or seeds it adds them.
A method is one of `personalize --method`, or base, the model itself under the class word. Its options are
  rates=A/B             learning rates of embeddings and offsets, which --sweep then leaves alone
  blend=A               weight of the soft path; sampling_blend=A when drawing alone
  rank=N, word=TEXT     of methods that have them
  prior=WEIGHT          prior preservation, for methods that have it
  encoder=DIR           another tuning-encoder; start=word for none of it; offsets=off, embeddings=off for a part
  gains=A/B             of the offsets that a tuning-encoder predicts, without tuning: of the values of cross-attention
                        and of self-attention
  focus=A               pixels beside the concept count A in tuning; lowest=A, highest=A: its share of the schedule
  lock=TEXT, beta=A, tau=A, gate=BETA/TAU, layers=TEXT, calibration=A
                        of perfusion (gate when drawing), infusion and disendiff
  draws=N, views=N, crop=A, flip=on|off, norm_weight=A, momentum=A, remat=on|off      of tuning

A folder holds pictures, one of each subject, or a folder of pictures for each. It may have prompts.json (templates
with {subject}, by kind) and subjects.json ({name: {"class": ..., "kind": ..., "files": [...]}}), or the
prompts_and_classes.txt of dreambooth. Methods see the first picture of a subject, scores all of them.

It writes to the output folder:
  report.html, report.md     tables with 95 % intervals, plots, pictures, failures
  metrics.json               all numbers
  pictures/                  sheets of pictures by method
  units/                     what every method drew of every subject, from which all else is made
  rates.json                 learning rates, with --sweep
  dreambench_plus/           of photographs, the folders that the scripts of DreamBench++ read""",
    "pretrain": """\
  datencoder pretrain --config configs/toyworld_vae.py --variant smoke --workdir out/vae --cpu-devices 2
  datencoder pretrain --config configs/sd15_laion.py --workdir runs/sd15 --set batch_size=1024 data.0.path=/data/laion
  datencoder pretrain --config configs/sd15_laion.py --workdir runs/sd15 --export-encoder out/encoder
  datencoder pretrain --config configs/sd15_laion.py --variant smoke --print-config

The same command again goes on where the last one stopped. In several processes it is the same command in each, with
one --workdir that all of them see: TPU slices, Slurm, Open MPI and Kubernetes jobs are recognized; elsewhere say
  datencoder pretrain ... --coordinator 10.0.0.1:1234 --processes 2 --process 0    # on 10.0.0.1
  datencoder pretrain ... --coordinator 10.0.0.1:1234 --processes 2 --process 1    # on the other machine

The recipes that come with the package, by name or as configs/NAME.py:
  sd15_laion         a tuning-encoder for Stable Diffusion 1.5 on shards of LAION
  sd15_paper         the same on the paper's data: ImageNet-1K and Open Images
  sd21_laion         a tuning-encoder for Stable Diffusion 2.1 at 768 px
  sdxl_laion         a tuning-encoder for Stable Diffusion XL
  e4t_faces          E4T for faces on Stable Diffusion 1.5
  toyworld_vae, toyworld_clip, toyworld_unet, toyworld_encoder, toyworld_e4t, toyworld_judge
                     the networks of the embedded model

It writes to the work folder:
  checkpoints/        the latest, by step
  metrics.jsonl       losses, rates and scores; tensorboard/ has the same as curves
  preview_*.png       samples by step
  config.json         the recipe as it was run""",
    "precompute": """\
  datencoder precompute --config configs/sd15_laion.py --out data/laion-records --views 2
  datencoder pretrain --config configs/sd15_laion.py --workdir runs/sd15 \\
      --set 'data=[{"kind": "records", "path": "data/laion-records"}]'

The same command again goes on where the last one stopped; several processes share the files, as in `pretrain`.
Records depend on base model, vision tower, resolution and crops: the recipe's own, which training then keeps.""",
    "plan": """\
  datencoder plan --models 1.5 --topology H100
  datencoder plan --config configs/sd15_laion.py --topology 8xH100 --set batch_size=64
  datencoder plan --config configs/sd15_laion.py --topology v5e:16x16
  datencoder plan --config configs/sd15_laion.py --topology v5e:4x4 --programs train --set accumulate=16
  datencoder plan --models 1.5 --methods lora --memory 8 16 --topology v5e:2x2

Its exit status is 1 if something does not fit. A plan for absent devices needs their compiler:
  pip install "datencoder_jax[plan]" for TPUs, "datencoder_jax[plan-gpu]" for GPUs""",
    "check": """\
  datencoder check --quick
  datencoder check --minutes 15 --out out/h100
  JAX_PLATFORMS=cpu datencoder check

Its parts, in this order:
  versions      of the software, the driver and the device
  attention     every implementation that the device can run, forward and backward, against XLA's in float32
  concept       one of the embedded model, against the reference that is shipped
  speed         prediction, drawing and 12 steps of tuning, cold and warm: seconds, peak memory, share of the peak;
                with Stable Diffusion 1.5's sizes and random weights, on a CPU with the embedded model
  pretraining   a step of a tuning-encoder at the largest batch that fits
  diffusers     LoRA steps and drawing by diffusers, where torch has CUDA, as a ratio

Its exit status is 1 if a comparison or a part fails; the other parts are run all the same. It writes to --out:
  check.json    all numbers
  check.md      a row for a table of devices""",
    "toyworld": """\
  datencoder toyworld --out robot.png
  datencoder toyworld --class fish --seed 3 --scene underwater --out fish.png
  datencoder toyworld --instance 1100005 --style sketch --accessory hat --out sketch.png""",
    "info": """\
  datencoder info
  datencoder info out/robot/concept.safetensors
  datencoder info --words""",
}
