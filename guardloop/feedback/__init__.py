"""Mining: what the judged responses say of the prompts that let them happen."""
