/* PVH entry of the bare guest (Xen's docs/misc/pvh.pandoc): 32-bit protected mode, no paging. */
.code32
.section .note.pvh, "a"
.long 4, 4, 18                  /* name and value are 4 bytes each; XEN_ELFNOTE_PHYS32_ENTRY */
.asciz "Xen"
.long _start
.section .text.start
.globl _start
_start:
    cli
    mov $stack_end, %esp
    push %ebx                   /* the start info */
    call bare_main
1:  hlt
    jmp 1b
.section .bss
.align 16
.skip 16384
stack_end:
.section .note.GNU-stack, ""
