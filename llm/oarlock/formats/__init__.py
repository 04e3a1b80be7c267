"""Reading untrusted JSON, YAML and safetensors headers: size and depth are bounded, content is checked and typed.

Nothing here knows what a file is for. The schema of a file is defined in the package that reads it: a dataclass, or a
TypedDict of typing_extensions, with limits of `annotated_types` (`Annotated[int, Ge(0)]`). Schemas don't import
pydantic, which is loaded when the first file is checked.
"""
