"""Pure model code: no meshes, no files, no flags."""
