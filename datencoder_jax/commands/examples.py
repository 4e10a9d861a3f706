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
  datencoder export out/cat/concept.safetensors --to kohya embedding --out ComfyUI/models/loras

It writes, by the values of --to:
  diffusers   pytorch_lora_weights.safetensors, learned_embeds.safetensors, concept.safetensors, pipeline.py
  kohya       NAME.safetensors, a LoRA for ComfyUI, Forge and A1111
  embedding   NAME_emb.safetensors, token vectors for the same
  card        README.md and samples.png, a model card""",
    "pretrain": """\
  datencoder pretrain --config configs/toyworld_vae.py --variant smoke --workdir out/vae --cpu-devices 2
  datencoder pretrain --config configs/sd15_laion.py --workdir runs/sd15 --set batch_size=1024 data.0.path=/data/laion
  datencoder pretrain --config configs/sd15_laion.py --workdir runs/sd15 --export-encoder out/encoder
  datencoder pretrain --config configs/sd15_laion.py --variant smoke --print-config

The same command again goes on where the last one stopped. In several processes it is the same command in each, with
one --workdir that all of them see: TPU slices, Slurm, Open MPI and Kubernetes jobs are recognized; elsewhere say
  datencoder pretrain ... --coordinator 10.0.0.1:1234 --processes 2 --process 0    # on 10.0.0.1
  datencoder pretrain ... --coordinator 10.0.0.1:1234 --processes 2 --process 1    # on the other machine

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
  datencoder plan --config configs/sd15_laion.py --topology v5e:16x16
  datencoder plan --config configs/sd15_laion.py --topology v5e:4x4 --programs train --set accumulate=16
  datencoder plan --models 1.5 --methods lora --memory 8 16 --topology v5e:2x2

Its exit status is 1 if something does not fit. A plan for TPUs needs no TPU, but their compiler:
  pip install "datencoder_jax[plan]\"""",
    "toyworld": """\
  datencoder toyworld --out robot.png
  datencoder toyworld --class fish --seed 3 --scene underwater --out fish.png
  datencoder toyworld --instance 1100005 --style sketch --accessory hat --out sketch.png""",
    "info": """\
  datencoder info
  datencoder info out/robot/concept.safetensors""",
}
