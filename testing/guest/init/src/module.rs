//! Loading and unloading kernel modules.

use std::ffi::CString;
use std::fs::File;

use rustix::system::{delete_module, finit_module};

/// Directory of the modules in the initramfs.
const MODULE_DIRECTORY: &str = "/modules";

/// Return an error for a module in use instead of waiting (`O_NONBLOCK` of fcntl.h).
const DELETE_NONBLOCK: i32 = 0o4000;

/// Loads a module from a path, or by its name from the module directory.
pub(crate) fn insert(name: &str, parameters: &str) -> Result<String, String> {
    let path = match name.contains('/') {
        true => name.to_owned(),
        false => format!("{MODULE_DIRECTORY}/{}.ko", name.trim_end_matches(".ko")),
    };
    let file = File::open(&path).map_err(|error| format!("cannot open {path}: {error}"))?;
    let parameters = CString::new(parameters).map_err(|error| error.to_string())?;
    finit_module(&file, &parameters, 0).map_err(|error| format!("cannot load {path}: {error}"))?;
    Ok(String::new())
}

/// Unloads a module.
pub(crate) fn remove(name: &str) -> Result<String, String> {
    let c_name = CString::new(name).map_err(|error| error.to_string())?;
    delete_module(&c_name, DELETE_NONBLOCK)
        .map_err(|error| format!("cannot unload {name}: {error}"))?;
    Ok(String::new())
}
