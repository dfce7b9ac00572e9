# All images at once: `TAG=$(python -m launch.images) docker buildx bake --file images/docker-bake.hcl`. The targets are
# those of the Dockerfile; scripts/images.sh takes their names from here, and needs no plugin.

variable "REGISTRY" {
  default = "guardloop"
}
variable "TAG" {
  default = "dev"
}

group "default" {
  targets = ["cpu", "gpu"]
}

target "cpu" {
  matrix     = { stage = ["prepare-data", "screen", "generate-responses", "mine-feedback", "train-guard", "evaluate", "register-model"] }
  name       = stage
  dockerfile = "images/Dockerfile"
  target     = stage
  tags       = ["${REGISTRY}/${stage}:${TAG}"]
}

# Stages that compute with a model.
target "gpu" {
  matrix     = { stage = ["screen", "generate-responses", "train-guard"] }
  name       = "${stage}-gpu"
  dockerfile = "images/Dockerfile"
  target     = stage
  args       = { FLAVOUR = "gpu" }
  tags       = ["${REGISTRY}/${stage}:${TAG}-gpu"]
}
