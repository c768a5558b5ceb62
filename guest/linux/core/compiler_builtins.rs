//! Replaces the crate of the same name, which rustc links into every `no_std` crate.
//! The kernel provides the memory functions, and nothing else of the real crate is
//! used: the module build fails on an undefined symbol.

#![feature(compiler_builtins)]
#![compiler_builtins]
#![no_builtins]
#![no_std]
#![allow(internal_features)]
