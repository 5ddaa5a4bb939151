"""Speed and size of the gateway beside a direct call, nginx and, where installed, litellm's proxy."""
