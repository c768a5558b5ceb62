// SPDX-License-Identifier: GPL-2.0
/*
 * Removes the shutdown method of the virtio bus, which resets every device. Kernels before 6.15 did
 * not have it, but stable kernels that the tests boot have a backport. Without it, a test sees what
 * a driver itself does at shutdown. For kernels in which the bus is not constant.
 */
#include <linux/module.h>
#include <linux/virtio.h>

/* Matches no device. Only a registered driver has a pointer to its bus. */
static const struct virtio_device_id ids[] = { { 0 } };

static int no_probe(struct virtio_device *vdev)
{
	return -ENODEV;
}

static struct virtio_driver driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.id_table = ids,
	.probe = no_probe,
};

static int __init lab_bus_init(void)
{
	struct bus_type *bus;
	int err = register_virtio_driver(&driver);

	if (err)
		return err;
	bus = (struct bus_type *)driver.driver.bus;
	bus->shutdown = NULL;
	unregister_virtio_driver(&driver);
	return 0;
}
module_init(lab_bus_init);

static void __exit lab_bus_exit(void)
{
}
module_exit(lab_bus_exit);

MODULE_DESCRIPTION("Removes the shutdown method of the virtio bus");
MODULE_LICENSE("GPL");
