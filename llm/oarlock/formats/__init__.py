"""The one way to read JSON, YAML and safetensors headers that others wrote: bounded, checked, typed.

Nothing here knows what a file is for. The schema of a kind lies with its subject: a dataclass, or a TypedDict of
typing_extensions, with limits of `annotated_types` (`Annotated[int, Ge(0)]`). None of them imports pydantic, which is
loaded when the first file is checked.
"""
